"""Prompts of a VideoLLM: tokens out of questions, answers and videos; saved and loaded with the
model."""

import functools
import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPImageProcessorPil, ProcessorMixin
from transformers.utils import cached_file

VIDEO_TOKEN = "<video>"
# where a prompt is split; what stands before a control token that is meant as one
CUT, MARK = "\x00", "\x01"

VICUNA_TEMPLATE = (  # for decoders whose tokenizer brings no chat template (LLaMA-2-7b-hf)
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class VideoLLMProcessor(ProcessorMixin):
    """Image processor + tokenizer + how many frames a video is sampled at; saved and loaded with
    the model."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_frames=8,
                 num_query_tokens=32,
                 sampling="linspace"):
        self.num_frames, self.sampling = num_frames, sampling
        self.num_query_tokens = num_query_tokens
        if tokenizer and not tokenizer.is_fast:
            raise OSError(f"{tokenizer.name_or_path}: its tokenizer is none of the tokenizers "
                          "library")
        chat_template = chat_template or (tokenizer and tokenizer.chat_template) or VICUNA_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        settings = json.loads(Path(find(path, "processor_config.json")).read_bytes())
        return cls(CLIPImageProcessorPil.from_pretrained(path), AutoTokenizer.from_pretrained(path),
                   chat_template=settings["chat_template"], num_frames=settings["num_frames"],
                   num_query_tokens=settings["num_query_tokens"], sampling=settings["sampling"])

    def save_pretrained(self, path, **kwargs):
        self.image_processor.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        settings = dict(chat_template=self.chat_template, num_frames=self.num_frames,
                        num_query_tokens=self.num_query_tokens, sampling=self.sampling)
        Path(path, "processor_config.json").write_text(json.dumps(settings, indent=2))

    @functools.cached_property
    def literal(self):
        """(tokenizer, pattern): the tokenizer with its added tokens (</s>, <assistant>, <video>,
        ..) under names that no text holds, MARK before each, and a pattern that finds their usual
        names. So what somebody typed is letters to it, whatever the tokenizer calls its tokens; all
        else is as in the original, ids included."""
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # runs of blanks, and the bytes of which unknown letters are made
        plain = r"\s*|<0x[0-9A-F]{2}>"
        names = {t["content"] for t in spec["added_tokens"]
                 if not re.fullmatch(plain, t["content"])}
        model, vocab, pad = spec["model"], spec["model"]["vocab"], self.tokenizer.pad_token
        whole = lambda merge: "".join(merge if isinstance(merge, list) else merge.split(" "))
        if pad != self.tokenizer.eos_token and pad in map(whole, model.get("merges", ())):
            names.discard(pad)  # an ordinary word serves as padding
        named = lambda name: MARK + name if name in names else name
        for token in spec["added_tokens"]:
            token["content"] = named(token["content"])
        model["vocab"] = ({named(name): i for name, i in vocab.items()} if isinstance(vocab, dict)
                          else [[named(name), score] for name, score in vocab])
        if "merges" in model:  # none makes a control token out of letters
            model["merges"] = [merge for merge in model["merges"] if whole(merge) not in names]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = named(model["unk_token"])
        spec |= dict(post_processor=None, truncation=None, padding=None)
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        return Tokenizer.from_str(json.dumps(spec)), re.compile("|".join(map(re.escape,
                                                                             longest_first)))

    def clean(self, text):
        """A text of users or models, ready for a template: control tokens in it, pulled apart by
        MARKs, are letters."""
        text = text.replace(CUT, "").replace(MARK, "").strip()
        return self.literal[1].sub(lambda m: "".join(letter + MARK for letter in m[0]), text)

    def prompt_ids(self, question, video=True, max_length=None):
        """The prompt's token ids, ready for an answer: `<video>` expanded to Q tokens, an assistant
        turn opened.

        question: one string, or chat messages [{"role","content"}, ...] ending with a user turn.
        Overlong text is cut at the *end of the last question*, video tokens and template never.
        ValueError if that is not enough."""
        messages = [{"role": "user", "content": question}] if isinstance(question,
                                                                         str) else question
        *head, last = [{**m, "content": self.clean(m["content"])} for m in messages]

        def encode(text):
            turns = [*head, {**last, "content": text}]
            if video:
                turns[0] = {**turns[0], "content": f"{VIDEO_TOKEN}\n{turns[0]['content']}"}
            return self._ids(self._template(turns))

        ids = encode(last["content"])
        if max_length is not None and len(ids) > max_length:
            question_ids = self._ids(last["content"])
            keep = len(question_ids) - (len(ids) - max_length)
            while len(ids) > max_length:  # text cut in two can take a token more
                if keep < 1:
                    raise ValueError(f"a prompt of {len(ids)} tokens cannot be cut to {max_length} "
                                     "and keep its video")
                ids, keep = encode(self.clean(self.tokenizer.decode(question_ids[:keep]))), keep - 1
        return ids

    def split_prompt_ids(self, head, *tails):
        """The prompts `head + tail` as lists of ids, the head's first: many tails, one head
        (oracle.py)."""
        parts = [f"{VIDEO_TOKEN}\n{self.clean(head)}", *(f"\n{self.clean(tail)}" for tail in tails),
                 ""]
        content = CUT.join(parts)  # `clean` leaves no other CUT
        head, *tails, end = self._template([{"role": "user", "content": content}]).split(CUT)
        return [self._ids(head), *(self._ids(tail + end) for tail in tails)]

    def _template(self, messages):
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template,
                                                  add_generation_prompt=True, tokenize=False)

    def _ids(self, text):
        """Ids of a text that went through `clean`, or of a template filled with such: its control
        tokens count."""
        tokenizer, names = self.literal
        text = re.sub(f"{MARK}|({names.pattern})(?!{MARK})", lambda m: MARK + m[1] if m[1] else "",
                      text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        video_id = self.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        return [i for t in ids for i in ([t] * self.num_query_tokens if t == video_id else [t])]

    def answer_ids(self, answer, max_length=None):
        """An answer's token ids with EOS at the end; a cut answer has no EOS: cutting is never
        learned as ending."""
        return [*self._ids(self.clean(answer)), self.tokenizer.eos_token_id][:max_length]

    def pad(self, rows, side):
        """Lists of ids -> (ids (B,L), mask (B,L) from lengths), padded on `side`."""
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[i, where], mask[i, where] = torch.tensor(row), 1
        return ids, mask

    def decode_answers(self, tokens, lengths):
        """tokens (B,G,T), lengths (B,G) counted with EOS -> B lists of G strings."""
        text = lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return [[text(t[:n]) for t, n in zip(ts.tolist(), ns.tolist())]
                for ts, ns in zip(tokens, lengths)]


def fits(processor, record, max_prompt_tokens):
    """Can the record's prompt be cut to so many tokens? Only its last question is ever cut, so long
    earlier turns, or video tokens in too little room, leave nothing of it: such a record must be
    left out before it is asked."""
    try:
        processor.prompt_ids(record["question"], record["clip"] is not None, max_prompt_tokens)
    except ValueError:
        return False
    return True


def find(name, file):
    """The path of a checkpoint's file, None where it has none. name: a folder, or a hub name
    (owner/model)."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        return str(Path(name, file)) if Path(name, file).exists() else None
    return cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)

"""What everyone who asks a decoder questions about contexts shares: the prompt in two parts, and greedy answers."""

from typing import Any

import torch
from torch import Tensor

from fewer.adapters.hf_cache import Cache
from fewer.types import FewerError


class Asker:
    """A transformers decoder and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def prompt(self, context: str, question: str) -> tuple[Tensor, Tensor]:
        """Token ids (1, n) up to the end of the context, and (1, m) from there to where the answer begins.

        Where nothing is left of a context, the first part is the first token there is.
        """
        if not context:
            whole = self.ids(self._asked(f"\n\n{question}"))
            return whole[:, :1], whole[:, 1:]
        if self.tokenizer.chat_template is None:
            return self.ids(context), self.ids(f"\n\n{question}\n")
        text = self._asked(f"{context}\n\n{question}")
        found = text.find(f"{context}\n\n{question}")  # all of it: a short context may stand in the template too
        if found < 0:
            raise FewerError(
                "the tokenizer's chat template changes the context, so it cannot be told from the question"
            )
        cut = found + len(context)
        return self.ids(text[:cut]), self.ids(text[cut:])

    def _asked(self, said: str) -> str:
        """What a user says, as the model expects it."""
        if self.tokenizer.chat_template is None:
            return f"{said}\n"
        message = {"role": "user", "content": said}
        return str(self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))

    def ids(self, text: str) -> Tensor:
        """Token ids (1, n) of a text as it is."""
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return torch.as_tensor(ids).to(self.model.device)

    def greedy(self, cache: Cache, first: Tensor, most: int) -> Tensor:
        """Greedy tokens (rows, <= most) after `first`, which is the first of them; the end token fills ended rows."""
        ends = self.ends()
        out = first.unsqueeze(1).repeat(1, most)  # a row that ended repeats its end
        going = torch.arange(len(first), device=first.device)
        step, made = first, 1
        while made < most:
            still = ~torch.isin(step, ends)
            if not bool(still.any()):
                break
            if int(still.sum()) <= len(going) // 2:  # ended rows cost as much as others: leave them when they are many
                cache.batch_select_indices(still.nonzero().flatten())
                going, step = going[still], step[still]
            step = torch.where(
                torch.isin(step, ends),
                step,
                self.model(step.unsqueeze(1), past_key_values=cache).logits[:, -1].argmax(-1),
            )
            out[going, made:] = step.unsqueeze(1)
            made += 1
        return out[:, :made]

    def ends(self) -> Tensor:
        """The tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends = self.tokenizer.eos_token_id if ends is None else ends
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return torch.tensor(listed, dtype=torch.long, device=self.model.device)

    def answers(self, said: Tensor) -> list[list[int]]:
        """The tokens of each row up to and with its end token: what comes after it in a batch was never said."""
        ends = set(self.ends().tolist())
        return [until(row, ends) for row in said.tolist()]

    def text(self, answer: list[int]) -> str:
        """An answer's tokens as text."""
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))


def until(tokens: list[int], ends: set[int]) -> list[int]:
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)

"""transformers' image processor and processor for MiniCPM-V: pictures and texts to what `MiniCPMV.forward` takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from memfit.errors import UserError
from memfit.families.minicpmv2 import DEFAULTS, QUERIES, TOKENS, image_cost, placeholder
from memfit.models.minicpmv.conversation import image_bounds
from memfit.models.minicpmv.images import packed
from memfit.models.minicpmv.resampler import refuse_time_steps

MARKER = "(<image>./</image>)"
NO_VIDEO = (
    "a video in the message: memfit's MiniCPM-V sees pictures only",
    "show frames as pictures of their own: max_slice_nums=1 and use_image_id=False",
)


def flat(pictures: Any) -> Iterator[Image.Image]:
    """PIL pictures of any nesting, in order. Arrays are (height, width, 3) bytes: no axis is guessed."""
    if isinstance(pictures, Image.Image):
        yield pictures
    elif isinstance(pictures, np.ndarray) and pictures.ndim == 3:
        yield Image.fromarray(pictures)
    else:
        for picture in pictures or ():
            yield from flat(picture)


class MiniCPMVImageProcessor(BaseImageProcessor):
    """Bytes and sizes of all crops: `pixel_values` uint8 (patches, 3 * patch * patch), `tgt_sizes` (crops, 2).

    Normalising is left to the model, on its device: a byte a value travels instead of four.
    """

    backend = "pil"
    model_input_names = ("pixel_values", "tgt_sizes")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**DEFAULTS, "image_feature_size": QUERIES, **kwargs})

    def settings(self, **changed: Any) -> dict[str, Any]:
        """What the image rule reads, with changes for one call (max_slice_nums for video frames)."""
        own = {name: getattr(self, name) for name in DEFAULTS}
        wanted = {name: value for name, value in changed.items() if name in DEFAULTS and value is not None}
        return {**own, "query_num": int(self.image_feature_size), **wanted}

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """The crops of all pictures, packed in order."""
        pixels, sizes = packed(list(flat(images)), self.settings(**kwargs))
        return BatchFeature({"pixel_values": pixels, "tgt_sizes": sizes}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """What preprocessor_config.json holds; the type's name is that of the checkpoints."""
        return {**super().to_dict(), "image_processor_type": "MiniCPMVImageProcessor"}


class MiniCPMVProcessor(ProcessorMixin):
    """Texts with `(<image>./</image>)` for each picture, and the pictures, to ids and tensors, padded on the left."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def wraps_slices(self) -> bool:
        """V 2.5's tokenizer has no picture numbers, and <slice> stands around the whole grid."""
        return TOKENS["image_id_start_token"] not in self.tokenizer.get_vocab()

    def __call__(
        self, text: Any = None, images: Any = None, max_slice_nums: int | None = None, **kwargs: Any
    ) -> BatchFeature:
        """input_ids, attention_mask, image_bound and the pictures' tensors.

        `images`: the pictures of all texts in order, nested or not. `max_slice_nums` and `use_image_id` hold for this
        call, for pixels and text alike. ValueError when markers and pictures differ in number, UserError for video.
        """
        refuse_time_steps(kwargs.get("temporal_ids"))
        if kwargs.get("videos") is not None:
            raise UserError(*NO_VIDEO)
        texts = [text] if isinstance(text, str) else list(text)
        pictures = list(flat(images))
        settings = self.image_processor.settings(max_slice_nums=max_slice_nums, use_image_id=kwargs.get("use_image_id"))
        settings |= {"slices_wrapped": self.wraps_slices}
        settings["use_image_id"] = bool(settings["use_image_id"]) and not self.wraps_slices
        marked = sum(words.count(MARKER) for words in texts)
        if marked != len(pictures):
            raise ValueError(f"{marked} markers {MARKER} in the text for {len(pictures)} pictures")
        waiting = iter(pictures)
        rows = [self._ids(self._with_pictures(words, waiting, settings)) for words in texts]
        batch = self._padded(rows, kwargs.get("padding_side", "left"))
        if pictures:
            batch |= dict(self.image_processor.preprocess(pictures, **settings))
        return BatchFeature(batch)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """As the tokenizer's, for messages whose content is a text or a list of texts and pictures, in either form:
        [picture, "words"] or [{"type": "image", ...}, {"type": "text", "text": "words"}]."""
        many = bool(conversation) and not isinstance(conversation[0], Mapping)
        talks = conversation if many else [conversation]
        messages = [[{**turn, "content": joined(turn["content"])} for turn in talk] for talk in talks]
        pictures = list(flat([list(pictures_in(turn["content"])) for talk in talks for turn in talk]))
        tokenize = kwargs.pop("tokenize", False)
        for name in ("return_dict", "return_tensors"):
            kwargs.pop(name, None)
        texts = [self.tokenizer.apply_chat_template(talk, tokenize=False, **kwargs) for talk in messages]
        if tokenize:
            return self(texts, pictures)
        return texts if many else texts[0]

    def _with_pictures(self, words: str, pictures: Iterator[Image.Image], settings: Mapping[str, Any]) -> str:
        pieces = words.split(MARKER)
        text = pieces[0]
        for index, piece in enumerate(pieces[1:]):
            text += placeholder(image_cost(settings, *next(pictures).size), index, settings) + piece
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _padded(self, rows: Sequence[list[int]], side: str) -> dict[str, Any]:
        """Padded by length: id 0 is an ordinary token ("!") and says nothing about padding."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        bounds = []
        for index, row in enumerate(rows):
            start = longest - len(row) if side == "left" else 0
            ids[index, start : start + len(row)] = torch.tensor(row)
            mask[index, start : start + len(row)] = 1
            found = image_bounds(row, self.tokenizer.convert_tokens_to_ids, self.wraps_slices)
            bounds.append(torch.tensor(found, dtype=torch.long).reshape(-1, 2) + start)
        return {"input_ids": ids, "attention_mask": mask, "image_bound": bounds}


def joined(content: Any) -> str:
    """A message's parts as one text: a newline between parts, the marker for a picture."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text":
            parts.append(part["text"])
        elif isinstance(part, Mapping) and part.get("type") == "video":
            raise UserError(*NO_VIDEO)
        else:
            parts.append(MARKER)
    return "\n".join(parts)


def pictures_in(content: Any) -> Iterator[Image.Image]:
    """The pictures of a message's content; paths are opened. ValueError for one that is not given."""
    for part in () if isinstance(content, str) else content:
        if isinstance(part, Image.Image):
            yield part
        elif isinstance(part, Mapping) and part.get("type") == "image":
            given = part.get("image", part.get("path", part.get("url")))
            if isinstance(given, str) and not re.match(r"https?://", given):
                with Image.open(given) as opened:
                    yield opened.convert("RGB")
            elif isinstance(given, Image.Image):
                yield given
            else:
                raise ValueError(f"a picture as a PIL image or a local path, not {given!r}")


class MiniCPMOProcessor(MiniCPMVProcessor):
    """The name that -o checkpoints' files give it; vision and text only."""

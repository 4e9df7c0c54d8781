"""What a model is conditioned on, and which inputs of its denoiser that makes. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from msgspec import Meta

from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import brief, located
from fastgen.files.names import check_objects
from fastgen.files.records import Extent, Index, Name, Record, Tokens, Width

BATCH: Final = "batch"  # the axis of a shape that has a row per image
STATES, POOLED, CLASS, GUIDANCE = "encoder_hidden_states", "text_embeds", "class_labels", "timestep_cond"
Dtype = Literal["float32", "int64"]
Shape = tuple[Width | Literal["batch"], ...]


class Text(Record, frozen=True):
    """A prompt: token ids of one or two text encoders -> states (B, tokens, width), and a pooled vector (B, pooled).

    `tokens` and `vocabulary` have an entry per text encoder. `pooled_input`: the denoiser takes the pooled vector too, as
    SDXL's does. `zero_unconditional`: without a prompt states and vector are zeros; else they are those of the empty prompt.
    """

    tokens: Annotated[tuple[Tokens, ...], Meta(min_length=1, max_length=2)]
    vocabulary: Annotated[tuple[Width, ...], Meta(min_length=1, max_length=2)]
    width: Width
    pooled: Width
    pooled_input: bool = False
    zero_unconditional: bool = False

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.vocabulary) or len(set(self.tokens)) != 1:
            found = f"found {list(self.tokens)} with vocabularies {list(self.vocabulary)}"
            raise InputError(f"text.tokens: {found}, expected the same number of tokens for each vocabulary")


class Condition(Record, frozen=True):
    """Everything that a model is conditioned on. Each part may be absent, and several may be there at once.

    `text`: a prompt. `labels`: name -> place in a multi-hot vector, for any number of labels per image. `classes`: name ->
    class id, for one class per image; `null_class`: the id that training used for "no class", None where there is none.
    `number`: one number per image, such as an angle. At most one of the last three is there. `guidance_width`: the width of the
    embedding of the guidance scale, for a distilled model that takes the scale as an input (Luo et al., Latent Consistency
    Models, 2023): guidance then costs no second row; 0 for any other model."""

    text: Text | None = None
    labels: Mapping[Name, Index] | None = None
    classes: Mapping[Name, Index] | None = None
    null_class: Index | None = None
    number: bool = False
    guidance_width: Extent = 0

    def __post_init__(self) -> None:
        given = {"labels": self.labels is not None, "classes": self.classes is not None, "number": self.number}
        if sum(given.values()) > 1:
            found = " and ".join(name for name, is_given in given.items() if is_given)
            raise InputError(f"condition: found {found}, expected one of them")
        if self.null_class is not None and self.classes is None:
            raise InputError(f"condition: null_class: found {self.null_class} without classes, expected null")
        if self.labels is not None:
            with located("labels"):
                check_objects(self.labels)

    @property
    def names(self) -> Mapping[str, int] | None:
        """What requests may name: the labels, or the classes."""
        return self.labels if self.labels is not None else self.classes

    @property
    def kind(self) -> str:
        """What a request holds for this model: "text", "labels", "text and labels", or "nothing"."""
        return kind_of(self.text is not None, self.names is not None or self.number)

    @property
    def takes(self) -> str:
        """The same in words for messages."""
        label = "labels" if self.labels is not None else "one class" if self.classes is not None else "one number"
        words = [*(["a prompt"] if self.text else []), *([label] if self.names is not None or self.number else [])]
        return " and ".join(words) or "nothing but a seed"

    @property
    def inputs(self) -> tuple[tuple[str, Dtype, Shape, int], ...]:
        """(name, dtype, shape, number of ids) of the denoiser's inputs besides sample and timestep, in their order."""
        inputs: list[tuple[str, Dtype, Shape, int]] = []
        if self.text is not None:
            inputs.append((STATES, "float32", (BATCH, self.text.tokens[0], self.text.width), 0))
            if self.text.pooled_input:
                inputs.append((POOLED, "float32", (BATCH, self.text.pooled), 0))
        if self.labels is not None:
            inputs.append((CLASS, "float32", (BATCH, len(self.labels)), 0))
        elif self.classes is not None:
            inputs.append((CLASS, "int64", (BATCH,), self.class_count))
        elif self.number:
            inputs.append((CLASS, "float32", (BATCH,), 0))
        if self.guidance_width:
            inputs.append((GUIDANCE, "float32", (BATCH, self.guidance_width), 0))
        return tuple(inputs)

    @property
    def class_count(self) -> int:
        """Class ids are smaller than this."""
        ids = [*(self.classes or {}).values(), *([] if self.null_class is None else [self.null_class])]
        return 1 + max(ids, default=-1)

    @property
    def guidable(self) -> bool:
        """Whether it has an unconditional value, so that a second row can guide the first."""
        return self.text is not None or self.labels is not None or self.null_class is not None

    def check_guided(self, guidance_scale: float) -> None:
        """InputError where the model has nothing to compare the condition with, so that guidance means nothing."""
        if guidance_scale == 1.0 or self.guidance_width or self.guidable:
            return
        reason = "it has no condition" if self.kind == "nothing" else "it was trained without an unconditional class"
        raise InputError(f"guidance_scale is {guidance_scale:g}, but this model cannot be guided: {reason}; give 1")

    def class_id(self, labels: Sequence[str]) -> int:
        """The id of the one class in a request's labels: a name, or a number. Raises InputError."""
        classes = self.classes or {}
        name = _only(labels, "class")
        if name in classes:
            return classes[name]
        if name.isascii() and name.isdigit() and int(name) in set(classes.values()):
            return int(name)
        raise unknown("class", name, list(classes))

    def numeric(self, labels: Sequence[str]) -> float:
        """The one number in a request's labels. Raises InputError."""
        text = _only(labels, "number")
        try:
            value = float(text)
        except ValueError:
            raise InputError(f"class: found {brief(text)}, expected a number") from None
        if value != value or abs(value) == float("inf"):
            raise InputError(f"class: found {brief(text)}, expected a finite number")
        return value

    def check_labels(self, labels: Sequence[str]) -> None:
        """InputError for labels that this model does not know, or too many of them."""
        if self.classes is not None:
            self.class_id(labels)
        elif self.number:
            self.numeric(labels)
        elif self.labels is not None:
            from fastgen.files.names import check_known

            check_known(labels, self.labels)


def kind_of(text: bool, labels: bool) -> str:
    words = [*(["text"] if text else []), *(["labels"] if labels else [])]
    return " and ".join(words) or "nothing"


def _only(labels: Sequence[str], what: str) -> str:
    if len(labels) != 1:
        raise InputError(f"labels: found {len(labels)}, this model takes exactly one {what} per image")
    return labels[0]

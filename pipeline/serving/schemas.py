"""Requests and replies of the API, as ``/openapi.json`` documents them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

SEGMENT_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "string", "format": "binary", "description": "the image"},
                        "request": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {"$ref": "#/components/schemas/SegmentRequest"},
                        },
                    },
                    "additionalProperties": {
                        "type": "string",
                        "format": "binary",
                        "description": "examples and their masks, named as in the request",
                    },
                }
            }
        },
    }
}
PREVIEW_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


class PromptRequest(BaseModel):
    """A prompt: words, or the name of the form part with an example."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, description="what to find, in words")
    image: str | None = Field(None, description="name of the part with an example image")
    mask: str | None = Field(
        None, description="name of the part with its mask: an image that is black outside the object"
    )
    name: str | None = Field(None, description="what to call an example in the legend")

    @model_validator(mode="after")
    def _one_kind(self) -> PromptRequest:
        if (self.text is None) == (self.image is None):
            raise ValueError("a prompt has either text or image")
        if self.mask is not None and self.image is None:
            raise ValueError("a mask belongs to an example image")
        return self


class SegmentRequest(BaseModel):
    """The ``request`` part of ``/api/segment``."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="a name from /api/models; default: the first")
    prompts: list[PromptRequest] = Field(
        default_factory=list, description="what to find; if empty, the model's own classes"
    )
    context: list[str] | None = Field(
        None, description="words that the prompts compete with; default: the model's"
    )


class ErrorReply(BaseModel):
    """An error and its remedy."""

    code: str
    message: str
    remedy: str


class ModelReply(BaseModel):
    """A model of this server."""

    name: str
    kind: str
    title: str
    notice: str
    text: bool = Field(description="accepts words")
    image: bool = Field(description="accepts example images")
    vocabulary: list[str]
    suggestions: list[str]
    context: list[str]
    threshold: float
    state: str = Field(description="idle, loading, ready or failed")
    error: ErrorReply | None = None


class ModelsReply(BaseModel):
    """All models, and the server's limits."""

    models: list[ModelReply]
    palette: list[str] = Field(description="colours of prompts, in order")
    limits: dict[str, float]


class LegendReply(BaseModel):
    """A class or prompt; its id is its position."""

    name: str
    color: str
    other: bool = Field(description="whether it stands for none of the prompts")


class SegmentReply(BaseModel):
    """Maps as 8-bit grey PNG in base64, all of the same size.

    Kind ``heat``: one map per prompt, 255 times its probability. Kind ``labels``: 255 times the probability
    of the best class, then that class's id; above 256 classes the id's lower and upper byte.
    """

    model: str
    kind: str
    width: int
    height: int
    image_width: int = Field(description="width of the upright image; maps of large images are smaller")
    image_height: int
    legend: list[LegendReply]
    maps: list[str]

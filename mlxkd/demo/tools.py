"""A tool of the demo world: its JSON Schema, and requests that call it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

from mlxkd.demo.values import GENERATORS, JSON_TYPES, Value, spoken

SLOT = re.compile(r"\{(\w+)\}")
SEGMENT = re.compile(r"\s*\[(?:!(\w+): )?([^\]]*)\]")


@dataclass(frozen=True)
class Param:
    """One parameter: a kind of value (see ``values.GENERATORS``) or a tuple of choices."""

    name: str
    kind: str | tuple[str, ...]
    required: bool = True
    description: str | None = None

    def schema(self) -> dict[str, Any]:
        """Its JSON Schema."""
        if isinstance(self.kind, tuple):
            schema: dict[str, Any] = {"type": "string", "enum": list(self.kind)}
        else:
            schema = {"type": JSON_TYPES[self.kind]}
            if schema["type"] == "array":
                schema["items"] = {"type": "string"}
        return schema | ({"description": self.description} if self.description else {})

    def sample(self, rng: random.Random, unseen: bool) -> Value:
        """A value of this kind; ``unseen`` takes words that training never sees."""
        return rng.choice(self.kind) if isinstance(self.kind, tuple) else GENERATORS[self.kind](rng, unseen)


@dataclass(frozen=True)
class DemoTool:
    """A tool and the templates of requests that call it; the last template is held out."""

    name: str
    description: str
    params: tuple[Param, ...]
    templates: tuple[str, ...] = field(default=())

    def schema(self) -> dict[str, Any]:
        """The tool in the OpenAI form, as chat templates take it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": {p.name: p.schema() for p in self.params},
                    "required": [p.name for p in self.params if p.required],
                },
            },
        }

    def request(self, rng: random.Random, *, unseen: bool) -> tuple[str, dict[str, Value]]:
        """A request and the arguments it asks for, in schema order."""
        template = self.templates[-1] if unseen else rng.choice(self.templates[:-1])
        return fill(template, self.params, rng, unseen)


def fill(template: str, params: tuple[Param, ...], rng: random.Random, unseen: bool) -> tuple[str, dict[str, Value]]:
    """Say a template: choose optional segments, draw values, and list the arguments in schema order."""
    by_name = {p.name: p for p in params}
    values: dict[str, Value] = {}

    def value_of(name: str) -> str:
        if name not in values:
            values[name] = by_name[name].sample(rng, unseen)
            # Two parameters of one kind (origin and destination) never share a value.
            while any(k != name and v == values[name] and isinstance(v, str) for k, v in values.items()):
                values[name] = by_name[name].sample(rng, unseen)
        return spoken(values[name])

    def segment(match: re.Match[str]) -> str:
        flag, text = match.groups()
        if rng.random() < 0.5:
            return ""
        if flag:
            values[flag] = True
        return " " + SLOT.sub(lambda m: value_of(m[1]), text)

    request = SLOT.sub(lambda m: value_of(m[1]), SEGMENT.sub(segment, template))
    return request, {p.name: values[p.name] for p in params if p.name in values}


def parse_catalog(text: str) -> tuple[DemoTool, ...]:
    """Read tools from the block format described in ``catalog``."""
    tools: list[DemoTool] = []
    head: tuple[str, str, tuple[Param, ...]] | None = None
    templates: list[str] = []
    for line in [*text.strip().splitlines(), ""]:
        if line.startswith("  "):
            templates.append(line.strip())
            continue
        if head:
            tools.append(DemoTool(*head, templates=tuple(templates)))
        if line:
            name, description, params = (part.strip() for part in line.split(" | "))
            head, templates = (name, description, tuple(_parse_param(p) for p in params.split())), []
    return tuple(tools)


def _parse_param(text: str) -> Param:
    name, kind = text.split(":")
    choices = tuple(kind.split("|"))
    return Param(name.rstrip("?"), choices if len(choices) > 1 else kind, required=not name.endswith("?"))

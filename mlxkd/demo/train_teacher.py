"""Train the embedded teacher from scratch on an endless stream of demo conversations.

    python -m mlxkd.demo.train_teacher

A one-time cost: the result ships in ``assets/teacher``. The run is resumable (run the command again) and
deterministic per step on one machine. The model starts with a copying circuit (see ``induction``) and early on
every other batch is a drill: repeat a list, or look up a key and copy its value. Only a model that copies from
its context can learn to read tools it has never seen. Assistant turns carry the loss, all else a tenth of it.

Every other step one half of the batch goes through a part of the model alone, the layers and MLP channels that a
student keeps, so that the teacher can be pruned to them and still work: structured dropout (LayerDrop, Fan et al. 2020,
arXiv 1909.11556) of one nested width (MatFormer, Devvrit et al. 2023, arXiv 2310.07707).
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxkd import compat
from mlxkd.demo import induction
from mlxkd.demo.tokenizer import VOCABULARY, train_tokenizer
from mlxkd.demo.world import conversations
from mlxkd.runtime import keep_heap, parallel_streams
from mlxkd.training import state

ASSETS = Path(__file__).with_name("assets")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": None,
    "torch_dtype": "float16",
}
# (rows, width) of a batch: about 2,600 positions each; a longer conversation is skipped.
SHAPES = ((20, 128), (14, 192), (10, 256), (8, 336), (6, 480))
# What the nested part keeps: these layers, and the first so many MLP channels of each.
NESTED_LAYERS, NESTED_CHANNELS, NESTED_EVERY = (0, 1, 5), 128, 2
CONTEXT_WEIGHT = 0.1
LOG_EVERY = 20
SAVE_EVERY = 200

logger = logging.getLogger(__name__)


def token_weights(tokens: np.ndarray, assistant: int, end: int) -> np.ndarray:
    """Loss weight of predicting each token: 1 in assistant turns (end mark included), 0 on padding, else a tenth."""
    weights = np.where(tokens == 0, 0.0, CONTEXT_WEIGHT).astype(np.float32)
    inside = False
    for i, token in enumerate(tokens):
        if inside:
            weights[i] = 1.0
        inside = token == assistant or (inside and token != end)
    return weights


def drill(rng: np.random.Generator, tokenizer: Any, shape: tuple[int, int]) -> np.ndarray:
    """Rows of random ``key:value,`` lists that the assistant repeats, half of them in another order; int32 [B, S+1]."""
    user, assistant, end, colon, comma = (
        tokenizer.convert_tokens_to_ids(mark) for mark in ("<|user|>", "<|assistant|>", "<|end|>", ":", ",")
    )
    first_word = 2 * 128 + 10  # behind marks and byte pieces

    def words(longest: int) -> list[int]:
        return [int(t) for t in rng.integers(first_word, VOCABULARY, rng.integers(1, longest + 1))]

    rows = np.empty((shape[0], shape[1] + 1), np.int32)
    for number, row in enumerate(rows):
        tokens: list[int] = []
        while len(tokens) < len(row):
            pairs = [[*words(2), colon, *words(5), comma] for _ in range(rng.integers(1, 7))]
            order = rng.permutation(len(pairs)) if number % 2 else range(len(pairs))
            said, again = itertools.chain(*pairs), itertools.chain(*(pairs[i] for i in order))
            tokens += [user, *said, end, assistant, *again, end]
        row[:] = tokens[: len(row)]
    return rows


def drill_share(step: int) -> float:
    """Share of the batches that are drills: half at first, a twentieth from step 540 on."""
    return max(0.05, 0.5 * (1 - step / 600))


def batches(tokenizer: Any, first: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Endless (tokens int32 [B, S+1], weights float32 [B, S+1]) batches from step ``first`` on."""
    assistant, end = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<|assistant|>", "<|end|>"))
    rng = np.random.default_rng(first)
    talk = conversation_batches(tokenizer, seed=first + 1)
    for step in itertools.count(first):
        ids = drill(rng, tokenizer, SHAPES[0]) if rng.random() < drill_share(step) else next(talk)
        yield mx.array(ids), mx.array(np.stack([token_weights(row, assistant, end) for row in ids]))


def conversation_batches(tokenizer: Any, seed: int) -> Iterator[np.ndarray]:
    """Endless int32 [B, S+1] batches of conversations in the shapes of ``SHAPES``, padded with token 0."""
    waiting: dict[tuple[int, int], list[np.ndarray]] = {shape: [] for shape in SHAPES}
    for record in conversations("train", seed, 10**9):
        text = tokenizer.apply_chat_template(record["messages"], tools=record["tools"], tokenize=False)
        tokens = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        shape = next((s for s in SHAPES if len(tokens) <= s[1] + 1), None)
        if shape is None:
            continue
        waiting[shape].append(np.pad(tokens, (0, shape[1] + 1 - len(tokens))))
        if len(waiting[shape]) == shape[0]:
            yield np.stack(waiting[shape])
            waiting[shape].clear()


def learning_rate(step: int, total: int, peak: float, begin: int = 0) -> float:
    """Linear warm-up over 100 steps from ``begin`` on, flat, then linear to zero over the last 40 % of ``total``."""
    return peak * min((step - begin + 1) / 100, 1.0, max(total - step, 0) / (0.4 * total))


def nested(model: Any, tokens: mx.array) -> mx.array:
    """Logits [B, S, V] of the nested part of a llama, for token ids [B, S]."""
    hidden = model.model.embed_tokens(tokens)
    for number in NESTED_LAYERS:
        layer = model.model.layers[number]
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), "causal", None)
        x = layer.post_attention_layernorm(hidden)
        gate, up = (p.weight[:NESTED_CHANNELS] for p in (layer.mlp.gate_proj, layer.mlp.up_proj))
        hidden = hidden + (nn.silu(x @ gate.T) * (x @ up.T)) @ layer.mlp.down_proj.weight[:, :NESTED_CHANNELS].T
    return model.model.embed_tokens.as_linear(model.model.norm(hidden))


def make_step(model: nn.Module, optimizer: optim.AdamW, last_half: Callable[[mx.array], mx.array]) -> Any:
    """A compiled update: (tokens, weights) -> mean loss of assistant tokens in the half that the whole model saw.

    The halves of a batch run side by side; the second one goes through ``last_half``.
    """
    forwards: tuple[Callable[[mx.array], mx.array], ...] = (model, last_half)
    streams = parallel_streams(len(forwards))

    def loss(tokens: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        total, answers = mx.array(0.0), mx.array(0.0)
        halves = zip(forwards, streams, mx.split(tokens, 2), mx.split(weights, 2), strict=True)
        for number, (forward, stream, t, w) in enumerate(halves):
            with mx.stream(stream):
                nll = nn.losses.cross_entropy(forward(t[:, :-1]).astype(mx.float32), t[:, 1:])
                part = (nll * w[:, 1:]).sum()
                if number == 0:
                    answer = w[:, 1:] == 1.0
                    answers = (nll * answer).sum() / answer.sum()
            total = total + part
        return total / weights[:, 1:].sum(), answers

    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, weights: mx.array) -> mx.array:
        (_, answer), gradients = nn.value_and_grad(model, loss)(tokens, weights)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return answer

    return step


def save_teacher(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write the fp16 model folder that ships."""
    half = compat.build_model(config)
    half.update(tree_map(lambda x: x.astype(mx.float16), model.parameters()))
    compat.save_model_folder(folder, half, config, tokenizer_from=folder)


@click.command(help=__doc__)
@click.option("--steps", default=3000, show_default=True, help="Updates of about 2,500 positions.")
@click.option("--peak", default=1.5e-3, show_default=True, help="Learning rate after warm-up.")
@click.option("--begin", default=0, help="First step, from the weights in --out, where there is no checkpoint.")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=Path("runs/teacher"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=ASSETS / "teacher", show_default=True)
def main(steps: int, peak: float, begin: int, checkpoint: Path, out: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_heap()
    if not (out / "tokenizer.json").exists():
        train_tokenizer(out)
    tokenizer = compat.load_tokenizer(out, {})
    config = CONFIG | {"eos_token_id": tokenizer.eos_token_id}
    mx.random.seed(0)
    model = compat.build_model(config)
    induction.seed_induction(model)
    if begin:
        shipped, _ = compat.load_model(out)
        model.update(tree_map(lambda x: x.astype(mx.float32), shipped.parameters()))
    optimizer = optim.AdamW(peak, betas=[0.9, 0.98], weight_decay=0.01, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    first = state.restore(checkpoint, model, optimizer).step if checkpoint.exists() else begin
    whole = make_step(model, optimizer, model)
    pruned = make_step(model, optimizer, partial(nested, model))
    losses: list[mx.array] = []
    since = time.perf_counter()
    # A resumed run sees other conversations, not the same ones again.
    for step, (tokens, weights) in zip(range(first, steps), batches(tokenizer, first), strict=False):
        mx.eval(losses)  # the last step was computed while this batch was made
        optimizer.learning_rate = mx.array(learning_rate(step, steps, peak, begin))
        losses.append((pruned if step % NESTED_EVERY == 0 else whole)(tokens, weights))
        mx.async_eval(losses[-1], model.state, optimizer.state)
        if (step + 1) % LOG_EVERY == 0:
            seconds = time.perf_counter() - since
            mean = float(np.mean([np.array(loss) for loss in losses]))
            logger.info("step %d loss %.4f %.2f s/step", step + 1, mean, seconds / LOG_EVERY)
            if not math.isfinite(mean):
                raise click.ClickException("the loss is not finite; try a smaller --peak")
            losses, since = [], time.perf_counter()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state.save(checkpoint, state.Position(step + 1, "teacher", "stream"), model, optimizer)
            save_teacher(model, config, out)


if __name__ == "__main__":
    main()

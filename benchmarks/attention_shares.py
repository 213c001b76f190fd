"""What rounding the attention's shares costs: INT8 queries, keys and values, with shares in FP16 and in INT8.

    python benchmarks/attention_shares.py

Seeded synthetic heads of 64 with the logits' standard deviation given, and with a sink: one key that draws about 45% of
every row, as class and register tokens do. The reference is attention of the unrounded operands in float64; rounding
follows the kernel's own (``attention_reference`` and the steps of its shares). SQNR of the output in dB.
"""

from __future__ import annotations

import math
from typing import Any

import click
import numpy as np
from machine import write_result

from resvit_engines.kernels.attention import AttentionConfig, attention_shares
from resvit_engines.kernels.numerics import stored

HEAD = 64
LENGTHS = (50, 197, 577)
SPREADS = (0.5, 1.5, 3.0, 6.0)
INT8_STEPS = 127.0


def heads_of(tokens: int, spread: float, sink: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values [1, 2, N, 64]; logits q k / 8 have the standard deviation ``spread``."""
    random = np.random.default_rng(tokens)
    shape = (1, 2, tokens, HEAD)
    q, k = (random.normal(0, math.sqrt(spread), shape) for _ in range(2))
    if sink:
        towards = np.ones(HEAD) / 8
        k[:, :, 0] = towards * 2 * math.log(tokens)
        q += towards * 4
    v = random.normal(0, 1, shape) * np.exp(random.normal(0, 0.5, (1, 2, 1, HEAD)))
    return q, k, v + random.normal(0, 0.3, (1, 2, 1, HEAD))


def mixed(shares: np.ndarray, v: np.ndarray, steps: float | None) -> np.ndarray:
    """The output with shares rounded to ``steps`` of each row's largest (and divided by their own sum), or to FP16."""
    relative = shares / shares.max(-1, keepdims=True)
    rounded = stored(relative, "fp16") if steps is None else np.rint(relative * steps) / steps
    return rounded @ v / (relative if steps is None else rounded).sum(-1, keepdims=True)


def sqnr(reference: np.ndarray, got: np.ndarray) -> float:
    """Signal to noise in dB."""
    return float(10 * np.log10(np.sum(reference**2) / np.sum((reference - got) ** 2)))


def measured(tokens: int, spread: float, sink: bool) -> dict[str, Any]:
    """One row of the table."""
    q, k, v = heads_of(tokens, spread, sink)
    scales = [float(np.abs(part).max()) / 127 for part in (q, k, v)]
    narrow = [stored(part, "int8", scale) for part, scale in zip((q, k, v), scales, strict=True)]
    config = AttentionConfig(
        2, HEAD, HEAD, 1 / 8, tokens, tokens, "split", "int8", q_scale=scales[0], k_scale=scales[1], v_scale=scales[2]
    )
    inputs = [part.swapaxes(1, 2).reshape(1, tokens, -1) for part in narrow]
    shares, values = attention_shares(config, *inputs)
    logits = q @ k.swapaxes(-1, -2) / 8
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    reference = weights / weights.sum(-1, keepdims=True) @ v
    largest = shares.max(-1, keepdims=True)
    lost = np.where(np.rint(INT8_STEPS * shares / largest) == 0, shares, 0.0).sum(-1).mean()
    return {
        "tokens": tokens,
        "logits": "sink" if sink else spread,
        "fp16_shares_db": round(sqnr(reference, mixed(shares, values * scales[2], None)), 1),
        "int8_shares_db": round(sqnr(reference, mixed(shares, values * scales[2], INT8_STEPS)), 1),
        "lost_weight": round(float(lost), 3),
    }


@click.command()
def main() -> None:
    """Print the table, and keep it."""
    rows = [measured(tokens, spread, sink=False) for tokens in LENGTHS for spread in SPREADS]
    rows += [measured(tokens, 0.5, sink=True) for tokens in LENGTHS]
    click.echo("tokens  logits  FP16 shares  INT8 shares  weight lost in INT8")
    for row in rows:
        click.echo(
            f"{row['tokens']:6d}  {row['logits']!s:>6}  {row['fp16_shares_db']:8.1f} dB"
            f"  {row['int8_shares_db']:8.1f} dB  {row['lost_weight']:.1%}"
        )
    click.echo(f"kept in {write_result('attention_shares', {'rows': rows})}")


if __name__ == "__main__":
    main()

"""The decoder: embedding, layers of attention and feed-forward behind RMS norms, head.

Parameter names and the rotary order are Hugging Face's, so that a checkpoint needs no renaming and
no permutation there. The arithmetic is that of ``transformers`` for every family of
``settings/model.py``; the tests hold the logits to 1e-5. Layers sit in a ``ModuleDict``, so that a
part of them, a pipeline stage, keeps its names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import Attention, Context, RMSNorm, attention_mask, rotary
from .lora.dropout import Rows
from .moe import MoE
from .settings.model import ModelConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class FeedForward(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act = _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual.

    ``body`` is ``run``, or what ``parallel.py`` wraps around it: recomputation, compilation. Both
    lie inside the module's hooks and leave its names alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, eps, offset = config.hidden_size, config.rms_norm_eps, config.family.gemma
        self.input_layernorm = RMSNorm(size, eps, offset)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(size, eps, offset)
        self.feed = "block_sparse_moe" if config.model_type == "mixtral" else "mlp"
        self.add_module(self.feed, MoE(config) if config.num_experts else FeedForward(config))
        self.body = self.run
        self.rows: Rows | None = None  # for the dropout of adapters

    def forward(
        self, x: Tensor, table: Tensor, mask: Tensor | None, numbers: Tensor | None = None
    ) -> Tensor:
        return self.body(x, table, mask, numbers)

    def run(self, x: Tensor, table: Tensor, mask: Tensor | None, numbers: Tensor | None) -> Tensor:
        """Compute the layer."""
        if self.rows is not None:
            self.rows.numbers = numbers
        x = x + self.self_attn(self.input_layernorm(x), table, mask)
        return x + self.feed_forward(self.post_attention_layernorm(x))

    @property
    def feed_forward(self) -> nn.Module:
        """The feed-forward, under whatever name the family has for it."""
        return self.get_submodule(self.feed)


class Backbone(nn.Module):
    """Everything before the head: what Hugging Face calls ``model``, or a stage's part of it."""

    def __init__(self, config: ModelConfig, layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.config, self.first, self.last = config, first, last
        self.context: Context | None = None
        if first:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(n): Layer(config) for n in layers})
        if last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.family.gemma)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        numbers: Tensor | None,
    ) -> Tensor:
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        if self.first:
            x = self.embed_tokens(x)
            if self.config.family.gemma:
                x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)
        table = rotary(positions, self.config, x.dtype)
        mask = attention_mask(self.config, positions.shape[1], self.context, documents)
        for layer in self.layers.values():
            x = layer(x, table, mask, numbers)
        return self.norm(x) if self.last else x


class Decoder(nn.Module):
    """A language model, or a pipeline stage of one.

    Token ids [rows, seq] (a later stage: hidden states [rows, seq, hidden]) become logits
    [rows, seq, vocab] (an earlier stage: hidden states).
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.first, self.last = config, first, last
        self.model = Backbone(config, layers or range(config.num_hidden_layers), first, last)
        if last:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    @property
    def tied(self) -> bool:
        """Whether head and embedding of this part are one parameter."""
        return self.config.tie_word_embeddings and self.first and self.last

    def tie(self) -> None:
        """Make the head's weight the embedding's again, where it should be.

        Whatever replaces parameters (leaving the meta device, tensor parallelism) parts them.
        """
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> Tensor:
        """Run the part.

        Args:
            x: token ids, or hidden states.
            positions, documents: as in ``Batch``; None for one document per row.
            numbers: int64 [rows], numbers of the rows since the start of the run, which dropout
                needs.
        """
        x = self.model(x, positions, documents, numbers)
        return self.lm_head(x) if self.last else x

    def set_context(self, context: Context) -> None:
        """Tell all that needs to know that rows are cut over ranks."""
        for module in self.modules():
            if isinstance(module, Attention | MoE | Backbone):
                module.context = context

"""RCML in PyTorch on Hugging Face's `CLIPModel`, as a peer: plain, and with our savings.

One module holds the parameters of both. *Plain* is what one would write from the paper: every pair
brings its two items and its sentence, each token has a key and a value, and the negatives are the
other pairs of the batch. *Factored* is given what makes ours cheap: each distinct item and sentence
is encoded once, W_K goes to the query and W_V and W_o act after pooling.
"""

import importlib.util
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, CLIPConfig

from rcml_jax.models.checkpoints import to_torch

Tensors = dict[str, torch.Tensor]


class States(NamedTuple):
    """Projected tokens (n, T, d), no padding (n, T) bool, place of the pooled one (n,)."""

    tokens: torch.Tensor
    mask: torch.Tensor
    pooled_index: torch.Tensor

    @property
    def pooled(self) -> torch.Tensor:
        """CLIP's own embeddings (n, d), not normalised."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        return self.tokens[rows, self.pooled_index]


class TorchRCML(nn.Module):
    """CLIP's towers and the four matrices of the pooling head (Eq. 3–6), nn.Linear each."""

    def __init__(self, config: CLIPConfig, *, beta: float = 0.6, pooled_logit: float = 1.0):
        super().__init__()
        self.clip = AutoModel.from_config(config, attn_implementation="sdpa")
        dim = config.projection_dim
        self.query, self.key, self.value, self.output = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.beta, self.pooled_logit = beta, pooled_logit

    def text_states(self, ids: torch.Tensor, mask: torch.Tensor, masked: bool = True) -> States:
        """Texts (n, T), mask (n, T) bool → states of every token up to EOT.

        `masked`: the tower, too, is given the mask, as Hugging Face's examples do. It is causal, so
        that its states up to EOT are the same without.
        """
        tower_mask = mask.long() if masked else None
        hidden = self.clip.text_model(input_ids=ids, attention_mask=tower_mask).last_hidden_state
        return States(self.clip.text_projection(hidden), mask, mask.sum(dim=1) - 1)

    def image_states(self, pixels: torch.Tensor) -> States:
        """Normalised images (n, 3, H, W) → states of CLS and patches."""
        tower = self.clip.vision_model
        hidden = tower.post_layernorm(tower(pixel_values=pixels).last_hidden_state)
        tokens = self.clip.visual_projection(hidden)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return States(
            tokens, mask, torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        )

    # Plain

    def pool_rows(self, states: States, relation: torch.Tensor, intra: torch.Tensor):
        """Each row under its own relation: relation (n, d), intra (n,) bool → z (n, d)."""
        query = self.query(relation)
        keys, values = self.key(states.tokens), self.value(states.tokens)
        scores = (keys @ query[:, :, None])[:, :, 0] / math.sqrt(keys.shape[-1])
        pooled = F.one_hot(states.pooled_index, keys.shape[1]) * intra[:, None]
        logits = (1 - self.beta) * scores + self.beta * self.pooled_logit * pooled
        weights = logits.masked_fill(~states.mask, -torch.inf).softmax(dim=-1)
        pooled = (weights[:, None, :] @ values)[:, 0]
        return F.normalize(self.output(pooled), dim=-1)

    def embed_pairs(self, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """z_T and z_I, (2B, d) each, of B anchors and their B positives under the pairs' relations.

        batch: ids and mask (2B, T), pixels (2B, 3, H, W), relation_ids and relation_mask (B, T'),
        a sentence a pair, intra (B,).
        """
        sentences = self.text_states(batch["relation_ids"], batch["relation_mask"])
        relation = sentences.pooled.repeat(2, 1)
        intra = batch["intra"].repeat(2)
        text = self.pool_rows(self.text_states(batch["ids"], batch["mask"]), relation, intra)
        return text, self.pool_rows(self.image_states(batch["pixels"]), relation, intra)

    # Factored

    def pool_all(self, states: States, relation: torch.Tensor, intra: torch.Tensor):
        """Every item under every relation: relation (R, d), intra (R,) bool → z (n, R, d)."""
        query = self.query(relation) @ self.key.weight
        scores = states.tokens @ query.T / math.sqrt(query.shape[-1])
        pooled = F.one_hot(states.pooled_index, scores.shape[1])[..., None] * intra
        logits = (1 - self.beta) * scores + self.beta * self.pooled_logit * pooled
        weights = logits.masked_fill(~states.mask[..., None], -torch.inf).softmax(dim=1)
        pooled = weights.transpose(1, 2) @ states.tokens
        return F.normalize(self.output(self.value(pooled)), dim=-1)

    def embed_items(self, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """z_T and z_I, (N, R, d) each, of N distinct items under R distinct relations.

        batch: ids and mask (N, T), pixels (N, 3, H, W), relation_ids and relation_mask (R, T'),
        intra (R,).
        """
        sentences = self.text_states(batch["relation_ids"], batch["relation_mask"], masked=False)
        relation, intra = sentences.pooled, batch["intra"]
        texts = self.text_states(batch["ids"], batch["mask"], masked=False)
        text = self.pool_all(texts, relation, intra)
        return text, self.pool_all(self.image_states(batch["pixels"]), relation, intra)


def load(model: TorchRCML, params: Any) -> TorchRCML:
    """The module with copies of our parameters, those of `rcml_jax.models.rcml.RCML`."""
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in torch_layout(params).items()}
    # Position ids are buffers, which our parameters do not have.
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if "position_ids" not in name], missing
    return model


def torch_layout(params: Any) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients, under the names and in the layout of `TorchRCML`."""
    tensors = {f"clip.{name}": x for name, x in to_torch(params["towers"]).items()}
    head = {f"{name}.weight": np.asarray(params["head"][name]) for name in params["head"]}
    # z = a H W_Vᵀ W_o: the last matrix alone stands on the right as it is.
    return tensors | head | {"output.weight": head["output.weight"].T}


def pairs_loss(
    model: TorchRCML, batch: Tensors, *, temperature: float, intra_modal_weight: float
) -> torch.Tensor:
    """The plain form's loss: Eq. 1–2 with the other pairs of the batch as negatives.

    batch: that of `embed_pairs`, and related (2B, 2B) bool, whether the items of two rows are
    paired under any relation, true where they are the same. At least one pair is inter-sample.

    One thing is cheaper than Eq. 2: a negative stays as it was pooled for its own pair, instead of
    being pooled again under the relation of every anchor. Under one relation the two are the same.
    """
    text, image = model.embed_pairs(batch)
    rows = torch.arange(len(text), device=text.device)
    target = rows.roll(len(text) // 2)  # Anchor and positive are each other's.
    hidden = batch["related"].clone()
    hidden[rows, target] = False
    inter = ~batch["intra"].repeat(2)

    def term(x: torch.Tensor, y: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        logits = ((x @ y.T).float() / temperature).masked_fill(hidden, -torch.inf)
        return masked_mean(F.cross_entropy(logits, target, reduction="none"), among)

    every = torch.ones_like(inter)
    cross_modal = (term(text, image, every) + term(image, text, every)) / 2
    intra_modal = term(text, text, inter) + term(image, image, inter)
    return cross_modal + intra_modal_weight * intra_modal


def items_loss(
    model: TorchRCML, batch: Tensors, *, temperature: float, intra_modal_weight: float
) -> torch.Tensor:
    """The factored form's loss: what `rcml_jax.losses.rcml.relation_contrastive` computes.

    batch: that of `embed_items`, and anchor, positive (R, G), pair_valid (R, G) bool and related
    (N, N) bool. Every item is valid, and at least one pair is inter-sample.
    """
    embedded = torch.stack(model.embed_items(batch)).transpose(1, 2)  # (2, R, N, d)
    rows = torch.cat([batch["anchor"], batch["positive"]], dim=1)
    columns = torch.cat([batch["positive"], batch["anchor"]], dim=1)
    live = batch["pair_valid"].repeat(1, 2)
    relations = torch.arange(len(rows), device=rows.device)[:, None]
    # (anchor's modality, candidate's modality, R, 2G, N)
    logits = embedded[:, None, relations, rows] @ embedded[None].transpose(-1, -2)
    logits = logits.float() / temperature  # Autocast has the product in bfloat16.
    kept = ~batch["related"][rows] | F.one_hot(columns, embedded.shape[2]).bool()
    logits = logits.masked_fill(~kept, -torch.inf)
    target = logits.gather(-1, columns[..., None].expand(2, 2, -1, -1, 1))[..., 0]
    losses = logits.logsumexp(dim=-1) - target

    def mean(x: int, y: int, among: torch.Tensor) -> torch.Tensor:
        return masked_mean(losses[x, y], among)

    inter = live & ~batch["intra"][:, None]
    cross_modal = (mean(0, 1, live) + mean(1, 0, live)) / 2
    return cross_modal + intra_modal_weight * (mean(0, 0, inter) + mean(1, 1, inter))


def masked_mean(x: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """The mean of some elements; indexing by a mask would wait for the device."""
    return (x * among).sum() / among.sum()


def step_function(
    loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[], torch.Tensor]:
    """A training step a call, which returns the loss before it."""

    def run() -> torch.Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return run


def loss_options(config: Any) -> dict:
    """Temperature and λ."""
    loss = config.loss
    return {"temperature": loss.temperature, "intra_modal_weight": loss.intra_modal_weight}


def torch_adamw(model: torch.nn.Module, config: Any) -> torch.optim.Optimizer:
    """PyTorch's fastest AdamW, with our options."""
    options = config.optimizer
    return torch.optim.AdamW(
        model.parameters(),
        lr=options.learning_rate,
        betas=(options.b1, options.b2),
        weight_decay=options.weight_decay,
        fused=True,
    )


def declare_torchvision() -> Any:
    """Make torchvision importable where its operators are not; what is returned must be kept.

    open_clip needs torchvision. One that was built for CUDA does not find its operators beside a
    CPU build of torch, and fails on import, and transformers with it. CLIP uses none of them, so
    that it is enough to declare them, before anything imports torchvision.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    # Its name differs by version.
    libraries = list(pathlib.Path(spec.origin).parent.glob("_C*.so"))
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        libraries = []
    if libraries:
        return None
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    return operators

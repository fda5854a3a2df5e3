"""The PyTorch twin: ITSELF a second time, to compare `itself_jax` with and to time it against.

It is written from the description of the method (the paper and the documented behaviour of its
published code), not from any existing implementation, neither the published one nor the JAX one.
That two independent readings give the same numbers is what makes them believable.

Parameters carry the names of the published checkpoints, so that such a file loads with
`load_state_dict(strict=True)`:

    twin = Twin(Sizes(num_identities=11003), Settings())
    twin.load_state_dict(torch.load("best.pth")["model"])
    image, text = twin.encode_image(images), twin.encode_text(ids)      # no gradient, running stats
    trainer = Trainer(twin)
    metrics = trainer.train_step(images, ids, pids, step=1, epoch=1)    # both count from 1

`images` are normalised (b, 3, height, width), `ids` token ids (b, t) padded with 0, `pids` identity
labels 0…C−1. All randomness is `torch.manual_seed`'s; data augmentation happens elsewhere.

The same numbers come about in two modes:

- `lean` (default): what a careful PyTorch programmer would write today. Attention maps only of the
  layers that are read, fused attention in all others; MARS as vectors times matrices, its discard
  by selection rather than sorting; one pass over the towers for both embeddings; vectorised hard
  negatives and pooling; parameters grouped by rate, fused Adam.
- `published`: the work that the published code does. Maps of all layers, within the autograd graph;
  MARS as full matrices, with a sort and a loop over samples for the discard; Python loops over hard
  negatives and pooling; every picture and sentence encoded twice at evaluation; one optimiser group
  per parameter.

Deviations from the published code, in both modes: parameters are float32 (there: float16); a
caption without words has its EOT token as its one valid bank row (there: NaN, in all later rows
too); ties among salient tokens go to the lower index (there: undefined); a batch of one identity is
an error (on an accelerator: NaN, so as not to wait for it).

Letters of array axes: `b` batch, `n` tokens (`t` of a text), `d` width, `h` heads, `e` embedding,
`m` local embedding, `k` kept tokens, `y`,`x` picture rows, columns.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Mode = Literal["lean", "published"]

TAL_TEMPERATURE, TAL_MARGIN = 0.015, 0.1
WORD_PADDING = 0  # CLIP pads with 0 and marks EOT as the largest id.
GRAB_LAYERS = ("visul_emb_layer.", "texual_emb_layer.")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of a model. The defaults are CLIP ViT-B/16 at 384×128 with CUHK-PEDES's identities."""

    patch_size: int = 16
    stride: int = 16
    image_size: tuple[int, int] = (384, 128)
    vision_width: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    text_length: int = 77
    vocab_size: int = 49408
    embed_dim: int = 512
    local_dim: int = 4096
    num_identities: int = 11003
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    @property
    def image_tokens(self) -> int:
        """CLS and the patches of the grid, which drops what does not fill a patch."""
        rows, columns = ((side - self.patch_size) // self.stride + 1 for side in self.image_size)
        return 1 + rows * columns


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the method does. The defaults are the published full method (MARS and ATS).

    `saliency` and `inference_saliency` are one of `mars`, `last`, `layer:K` (0-based), `mean` and
    `std`. `mars_layers` of None are (depth // 3, depth − 1) of each tower. Without `ats` the bank's
    size follows the constant `ratio`, which inference always uses. Without `local` the model is the
    baseline: global embeddings and global losses only.
    """

    local: bool = True
    saliency: str = "mars"
    inference_saliency: str = "last"
    mars_layers: tuple[int, ...] | None = None
    mars_discard: float = 0.25
    ats: bool = True
    ats_horizon_steps: int = 1450
    ratio_start: float = 0.65
    ratio_end: float = 0.5
    ratio: float = 0.4
    mismatch_label: Literal["batch_max", "extra_class"] = "batch_max"


class TowerOutput(NamedTuple):
    """Projected tokens of one encoder and the head-averaged attention of the layers asked for."""

    tokens: Float[Tensor, "b n e"]
    maps: dict[int, Float[Tensor, "b n n"]]


class Bank(NamedTuple):
    """Positions of the kept tokens, most salient first, and which of them are real words."""

    indices: Int[Tensor, "b k"]
    valid: Bool[Tensor, "b k"]


class Embeddings(NamedTuple):
    """Un-normalised embeddings of pictures or sentences; `local` is None in the baseline."""

    global_: Float[Tensor, "b e"]
    local: Float[Tensor, "b m"] | None


class HardNegatives(NamedTuple):
    """Of other identities, for each i: the image most like text i, the text most like image i."""

    image: Int[Tensor, " b"]
    text: Int[Tensor, " b"]


class BranchLosses(NamedTuple):
    """The losses of one branch, global or local: TAL summed over the batch, the others means."""

    tal: Float[Tensor, ""]
    cid: Float[Tensor, ""]
    id_: Float[Tensor, ""]
    negatives: HardNegatives


class TrainOutput(NamedTuple):
    """Losses of one batch, and the choices behind them. What is local is None in the baseline."""

    total: Float[Tensor, ""]
    global_: BranchLosses
    local: BranchLosses | None
    image: Embeddings
    text: Embeddings
    image_bank: Bank | None
    text_bank: Bank | None


class StepMetrics(NamedTuple):
    """A line of training metrics. Reading the 0-dim tensors with `float()` waits for the device."""

    step: int
    epoch: int
    loss: Tensor
    loss_tal: Tensor
    loss_cid: Tensor  # CID and ID terms.
    grad_norm: Tensor  # Of all gradients, before weight decay.
    learning_rate: float  # Of the base group, as used in this step.
    bank_image: int  # The k of this step; 0 in the baseline.
    bank_text: int


# Encoders


class Attention(nn.Module):
    """Multi-head self-attention that returns its head-averaged probabilities on request."""

    def __init__(self, width: int, heads: int, *, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def _split(self, x: Float[Tensor, "b n d"]) -> Iterator[Float[Tensor, "b h n _"]]:
        """Query, key and value per head."""
        b, n, d = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return iter(qkv.view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4))

    def _join(self, x: Float[Tensor, "b h n _"]) -> Float[Tensor, "b n d"]:
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        query, key, value = self._split(x)
        return self._join(F.scaled_dot_product_attention(query, key, value, is_causal=self.causal))

    def with_map(
        self, x: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n n"]]:
        """The same output, and the attention probabilities averaged over heads."""
        query, key, value = self._split(x)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if self.causal:
            n = x.shape[1]
            future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        probabilities = scores.softmax(dim=-1)
        return self._join(probabilities @ value), probabilities.mean(dim=1)


class Mlp(nn.Module):
    """CLIP's two-layer perceptron, four times as wide inside."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = self.c_fc(x)
        x = x * torch.sigmoid(1.702 * x) if self.activation == "quick_gelu" else F.gelu(x)
        return self.c_proj(x)


class Block(nn.Module):
    """A pre-LN transformer layer."""

    def __init__(self, width: int, heads: int, activation: str, *, causal: bool):
        super().__init__()
        self.attn = Attention(width, heads, causal=causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, activation)
        self.ln_2 = nn.LayerNorm(width)


class Transformer(nn.Module):
    """A stack of layers that hands out the attention maps of the layers in `read`."""

    def __init__(self, width: int, depth: int, heads: int, activation: str, *, causal: bool):
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(width, heads, activation, causal=causal) for _ in range(depth)
        )

    def forward(self, x: Float[Tensor, "b n d"], read: Collection[int], mode: Mode) -> TowerOutput:
        maps = {}
        for layer, block in enumerate(self.resblocks):
            normed = block.ln_1(x)
            if layer in read:
                attended, map_ = block.attn.with_map(normed)
                # Selection is by index, so no gradient can arrive here.
                maps[layer] = map_ if mode == "published" else map_.detach()
            else:
                attended = block.attn(normed)
            x = x + attended
            x = x + block.mlp(block.ln_2(x))
        return TowerOutput(x, maps)


class Vision(nn.Module):
    """CLIP's vision transformer, all tokens projected: CLS, then the grid of patches by rows."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.vision_width
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(sizes.image_tokens, width))
        self.proj = nn.Parameter(torch.empty(width, sizes.embed_dim))
        self.conv1 = nn.Conv2d(3, width, sizes.patch_size, sizes.stride, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, sizes.vision_depth, sizes.vision_heads, sizes.activation, causal=False
        )
        self.ln_post = nn.LayerNorm(width)

    def forward(
        self, images: Float[Tensor, "b 3 y x"], read: Collection[int], mode: Mode
    ) -> TowerOutput:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        cls = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        x = self.ln_pre(torch.cat([cls, patches], dim=1) + self.positional_embedding)
        x, maps = self.transformer(x, read, mode)
        return TowerOutput(self.ln_post(x) @ self.proj, maps)


class Clip(nn.Module):
    """Both encoders. The text encoder's parameters lie here, as in CLIP's own files."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.text_width
        self.positional_embedding = nn.Parameter(torch.empty(sizes.text_length, width))
        self.text_projection = nn.Parameter(torch.empty(width, sizes.embed_dim))
        self.visual = Vision(sizes)
        self.transformer = Transformer(
            width, sizes.text_depth, sizes.text_heads, sizes.activation, causal=True
        )
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.ln_final = nn.LayerNorm(width)

    def text(self, ids: Int[Tensor, "b t"], read: Collection[int], mode: Mode) -> TowerOutput:
        x = self.token_embedding(ids) + self.positional_embedding
        x, maps = self.transformer(x, read, mode)
        return TowerOutput(self.ln_final(x) @ self.text_projection, maps)


# MARS and the other saliency sources


def layers_read(source: str, depth: int, mars_layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The 0-based layers, in ascending order, whose attention a saliency source needs."""
    match source.split(":"):
        case ["mars"]:
            layers = mars_layers or (depth // 3, depth - 1)
        case ["last"]:
            layers = (depth - 1,)
        case ["layer", index] if index.isdecimal():
            layers = (int(index),)
        case ["mean"] | ["std"]:
            layers = tuple(range(depth))
        case _:
            raise ValueError(f"saliency={source!r}: use mars, last, layer:K, mean or std")
    if any(not 0 <= layer < depth for layer in layers):
        raise ValueError(f"saliency={source!r} reads layers {layers}, the encoder has {depth}")
    return tuple(sorted(layers))


def discard_lowest(map_: Float[Tensor, "b n n"], share: float) -> Float[Tensor, "b n n"]:
    """Sets the lowest ⌊share·n²⌋ entries of each map to 0; of equals, those of lower flat index.

    Flat index 0 counts among the lowest where it is one of them, but keeps its value.
    """
    flat = map_.flatten(1)
    count = int(flat.shape[1] * share)
    if count == 0:
        return map_
    threshold = flat.kthvalue(count, dim=1, keepdim=True).values
    below, equal = flat < threshold, flat == threshold
    equal_to_drop = count - below.sum(dim=1, keepdim=True)
    dropped = below | (equal & (equal.cumsum(dim=1) <= equal_to_drop))
    dropped[:, 0] = False
    return flat.masked_fill(dropped, 0).view_as(map_)


def discard_lowest_by_sort(map_: Float[Tensor, "b n n"], share: float) -> Float[Tensor, "b n n"]:
    """`discard_lowest` the published way: orders all entries, then zeroes sample by sample."""
    flat = map_.flatten(1).clone()
    lowest = flat.sort(dim=1, stable=True).indices[:, : int(flat.shape[1] * share)]
    for sample in range(len(flat)):
        indices = lowest[sample]
        flat[sample, indices[indices != 0]] = 0
    return flat.view_as(map_)


def rollout_row(
    maps: list[Float[Tensor, "b n n"]], position: Int[Tensor, " b"], *, discard: float
) -> Float[Tensor, "b n"]:
    """MARS: row `position` of the attention rollout over `maps`, first layer first.

    With D the map without its lowest entries and Â = (D + I)/2, rows normalised to sum 1, the
    rollout is Â_last ··· Â_first. One row of it, e·Â_last ··· Â_first, needs no product of
    matrices: r·Â = (r/s)·(D + I), where s = rowsum(D) + 1.
    """
    with full_precision(maps[0]):
        row = F.one_hot(position, maps[0].shape[-1]).to(maps[0].dtype)
        for map_ in reversed(maps):
            kept = discard_lowest(map_, discard)
            scaled = row / (kept.sum(dim=-1) + 1)
            row = torch.einsum("bi,bij->bj", scaled, kept) + scaled
    return row


def rollout_matrix(maps: list[Float[Tensor, "b n n"]], *, discard: float) -> Float[Tensor, "b n n"]:
    """The whole attention rollout over `maps`, as the published code computes it."""
    with full_precision(maps[0]):
        eye = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
        rolled = eye
        for map_ in maps:
            mixed = (discard_lowest_by_sort(map_, discard) + eye) / 2
            rolled = mixed / mixed.sum(dim=-1, keepdim=True) @ rolled
    return rolled


def saliency_row(
    source: str,
    maps: dict[int, Float[Tensor, "b n n"]],
    position: Int[Tensor, " b"],
    *,
    discard: float,
    mode: Mode,
) -> Float[Tensor, "b n"]:
    """How much the model looks at each token, seen from token `position` (CLS or EOT)."""
    batch = torch.arange(len(position), device=position.device)
    layers = list(maps.values())
    if mode == "lean":
        if source == "mars":
            return rollout_row(layers, position, discard=discard)
        rows = torch.stack([map_[batch, position] for map_ in layers])
        return rows.std(dim=0, unbiased=False) if source == "std" else rows.mean(dim=0)
    if source == "mars":
        fused = rollout_matrix(layers, discard=discard)
    elif source == "std":
        fused = torch.stack(layers).std(dim=0, unbiased=False)
    else:
        fused = torch.stack(layers).mean(dim=0)
    return fused[batch, position]


# ATS and the attentive bank


def bank_size(candidates: int, settings: Settings, step: int | None) -> int:
    """ATS: how many of `candidates` tokens are kept at optimiser step `step`; None is inference.

    Steps count from 1. The order of the operations matters: another one gives 7 in place of 6 for
    14 candidates.
    """
    if step is None or not settings.ats:
        return int(candidates * settings.ratio)
    horizon = settings.ats_horizon_steps
    t = min(max(step, 1), horizon) / horizon
    decay = (settings.ratio_end / settings.ratio_start) ** t
    return int((candidates * settings.ratio_start) * decay)


def image_bank(row: Float[Tensor, "b n"], k: int) -> Bank:
    """The k most salient patches; CLS is no candidate. Ties go to the lower index."""
    # torch.topk leaves the order of equal values open; a stable sort does not.
    order = row[:, 1:].sort(dim=1, descending=True, stable=True).indices
    indices = order[:, :k] + 1
    return Bank(indices, torch.ones_like(indices, dtype=torch.bool))


def text_bank(row: Float[Tensor, "b t"], ids: Int[Tensor, "b t"], k: int) -> Bank:
    """The k most salient words; captions of fewer words are filled up with pads, marked invalid.

    SOT and EOT are no candidates, except EOT in a caption without words. A token of id 0 counts as
    a pad wherever it stands.
    """
    eot = ids.argmax(dim=1, keepdim=True)
    padding = ids == WORD_PADDING
    words = (~padding).sum(dim=1, keepdim=True) - 2
    row = row.masked_fill(padding, 0)
    row = row.scatter(1, eot, torch.where(words > 0, -1.0, math.inf).to(row.dtype))
    row[:, 0] = -1
    indices = row.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.arange(k, device=ids.device)
    return Bank(indices, kept < words.clamp(min=1))


# GRAB


class GrabMlp(nn.Module):
    """Two linear layers with BatchNorm between; the second BatchNorm is stored and never used."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, out)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(hidden), nn.BatchNorm1d(out)])

    def forward(self, x: Float[Tensor, "b k e"]) -> Float[Tensor, "b k m"]:
        hidden = self.layers[0](x)
        # The statistics are those of all bank rows, pads included.
        normed = self.bns[0](hidden.flatten(0, 1)).view_as(hidden)
        return self.layers[1](F.relu(normed))


class Grab(nn.Module):
    """GRAB: the local embedding, max over the valid bank rows of Linear(x) + MLP(x)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.linear = nn.Linear(sizes.embed_dim, sizes.local_dim)
        self.mlp = GrabMlp(sizes.embed_dim, sizes.local_dim // 2, sizes.local_dim)

    def skip(self, x: Float[Tensor, "b k e"]) -> Float[Tensor, "b k m"]:
        return self.linear(x)

    def forward(
        self, tokens: Float[Tensor, "b n e"], bank: Bank, mode: Mode
    ) -> Float[Tensor, "b m"]:
        chosen = tokens.gather(1, bank.indices[..., None].expand(-1, -1, tokens.shape[-1]))
        chosen = chosen / (chosen.norm(dim=-1, keepdim=True) + 1e-8)
        features = self.skip(chosen) + self.mlp(chosen)
        if mode == "published":
            counts = bank.valid.sum(dim=1)
            return torch.stack(
                [rows[:count].amax(dim=0) for rows, count in zip(features, counts, strict=True)]
            )
        return features.masked_fill(~bank.valid[..., None], -math.inf).amax(dim=1)


class ImageGrab(Grab):
    """GRAB of pictures: its skip layer is `fc`; `linear` is stored and never used."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self.fc = nn.Linear(sizes.embed_dim, sizes.local_dim)

    def skip(self, x: Float[Tensor, "b k e"]) -> Float[Tensor, "b k m"]:
        return self.fc(x)


# Losses


def full_precision(x: Tensor) -> torch.autocast:
    """Similarities, losses and MARS stay out of reduced-precision arithmetic."""
    return torch.autocast(x.device.type, enabled=False)


def widened(x: Tensor) -> Tensor:
    """float32 of a half-precision tensor; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def tal(
    image: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    pids: Int[Tensor, " b"],
    *,
    temperature: float = TAL_TEMPERATURE,
    margin: float = TAL_MARGIN,
) -> Float[Tensor, ""]:
    """Triplet alignment, summed over the rows of S = cos(text, image) and of its transpose.

    A row's loss is max(0, margin − Σ_P α·S + τ·log Σ_neg exp(S/τ)), where α is the softmax of S/τ
    over the positives P, through which no gradient flows.
    """
    with full_precision(image):
        image, text = widened(image), widened(text)
        unit_image = image / image.norm(dim=1, keepdim=True)
        unit_text = text / text.norm(dim=1, keepdim=True)
        similarity = unit_text @ unit_image.T
        positive = pids[:, None] == pids
        loss = similarity.new_zeros(())
        for scores in (similarity, similarity.T):
            scaled = scores / temperature
            weights = scaled.detach().masked_fill(~positive, -math.inf).softmax(dim=1)
            attracted = (weights * scores).sum(dim=1)
            repelled = scaled.masked_fill(positive, -math.inf).logsumexp(dim=1) * temperature
            loss = loss + F.relu(margin - attracted + repelled).sum()
    return loss


@torch.no_grad()
def hard_negatives(
    image: Float[Tensor, "b e"], text: Float[Tensor, "b e"], pids: Int[Tensor, " b"], mode: Mode
) -> HardNegatives:
    """The most similar image for each text and text for each image, of other identities."""
    with full_precision(image):
        similarity = F.normalize(widened(text), dim=1) @ F.normalize(widened(image), dim=1).T
    if mode == "published":
        return HardNegatives(
            _negatives_by_loop(similarity, pids), _negatives_by_loop(similarity.T, pids)
        )
    others = similarity.masked_fill(pids[:, None] == pids, -math.inf)
    return HardNegatives(others.argmax(dim=1), others.argmax(dim=0))


def _negatives_by_loop(
    similarity: Float[Tensor, "b b"], pids: Int[Tensor, " b"]
) -> Int[Tensor, " b"]:
    """Walks each row from the most similar down to the first of another identity."""
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    negatives = []
    for i in range(len(pids)):
        for j in order[i]:
            if pids[i] != pids[j]:
                negatives.append(j)
                break
    return torch.stack(negatives)


def cid(
    image: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    pids: Int[Tensor, " b"],
    negatives: HardNegatives,
    *,
    mlp: nn.Module,
    classifier: nn.Module,
    mismatch: Int[Tensor, ""],
) -> Float[Tensor, ""]:
    """Cross-modal identity: classify 3b pairs, once as [image; text] and once as [text; image].

    The pairs: all (v_i, t_i) with their identity, all (v_negative, t_i) and all (v_i, t_negative)
    with the label `mismatch`. Gradients flow through the negatives.
    """
    images = torch.cat([image, image[negatives.image], image])
    texts = torch.cat([text, text, text[negatives.text]])
    labels = torch.cat([pids, mismatch.expand(2 * len(pids))])
    pairs = torch.cat([torch.cat([images, texts], dim=1), torch.cat([texts, images], dim=1)])
    # Both halves are equally long, so the mean of all is the mean of the two means.
    return F.cross_entropy(widened(classifier(mlp(pairs))), labels.repeat(2))


def identity(
    image: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    pids: Int[Tensor, " b"],
    *,
    classifier: nn.Module,
) -> Float[Tensor, ""]:
    """Identity classification of both modalities by one linear classifier."""
    image_logits, text_logits = widened(classifier(image)), widened(classifier(text))
    return F.cross_entropy(image_logits, pids) + F.cross_entropy(text_logits, pids)


# The whole model


class Twin(nn.Module):
    """ITSELF with the names of the published parameters. It starts from random weights."""

    def __init__(self, sizes: Sizes, settings: Settings, mode: Mode = "lean"):
        super().__init__()
        if mode not in ("lean", "published"):
            raise ValueError(f"mode={mode!r}: use lean or published")
        self.sizes, self.settings, self.mode = sizes, settings, mode
        for source in (settings.saliency, settings.inference_saliency):
            for depth in (sizes.vision_depth, sizes.text_depth):
                layers_read(source, depth, settings.mars_layers)
        classes = sizes.num_identities + 1
        self.base_model = Clip(sizes)
        self.classifier_global = nn.Linear(sizes.embed_dim, classes)
        self.mlp_global = _pair_mlp(sizes.embed_dim)
        self.classifier_id_global = nn.Linear(sizes.embed_dim, classes)
        if settings.local:
            self.classifier_grab = nn.Linear(sizes.local_dim, classes)
            self.mlp_grab = _pair_mlp(sizes.local_dim)
            self.classifier_id_grab = nn.Linear(sizes.local_dim, classes)
            self.visul_emb_layer = ImageGrab(sizes)
            self.texual_emb_layer = Grab(sizes)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Classifiers as the method says, towers as CLIP does; all else keeps torch's own."""
        for name, module in self.named_modules():
            if name.startswith("classifier"):
                nn.init.normal_(module.weight, std=0.001)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Transformer):
                width = module.resblocks[0].ln_1.normalized_shape[0]
                into, out = width**-0.5, (2 * width * len(module.resblocks)) ** -0.5
                for block in module.resblocks:
                    nn.init.normal_(block.attn.in_proj_weight, std=into)
                    nn.init.normal_(block.attn.out_proj.weight, std=out)
                    nn.init.zeros_(block.attn.out_proj.bias)
                    nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                    nn.init.normal_(block.mlp.c_proj.weight, std=out)
        clip = self.base_model
        nn.init.normal_(clip.token_embedding.weight, std=0.02)
        nn.init.normal_(clip.positional_embedding, std=0.01)
        nn.init.normal_(clip.text_projection, std=self.sizes.text_width**-0.5)
        for parameter in (
            clip.visual.class_embedding,
            clip.visual.positional_embedding,
            clip.visual.proj,
        ):
            nn.init.normal_(parameter, std=self.sizes.vision_width**-0.5)

    def encode_image(self, images: Float[Tensor, "b 3 y x"]) -> Embeddings:
        """Embeddings for ranking; switches the model to evaluation."""
        return self._encode(self._image, images)

    def encode_text(self, ids: Int[Tensor, "b t"]) -> Embeddings:
        """Embeddings for ranking; switches the model to evaluation."""
        return self._encode(self._text, ids)

    @torch.no_grad()
    def _encode(self, embed: Callable, inputs: Tensor) -> Embeddings:
        self.eval()
        source = self.settings.inference_saliency
        embeddings, _ = embed(inputs, source, None)
        if self.mode == "published" and self.settings.local:
            again, _ = embed(inputs, source, None)
            embeddings = Embeddings(embeddings.global_, again.local)
        return embeddings

    def forward(
        self,
        images: Float[Tensor, "b 3 y x"],
        ids: Int[Tensor, "b t"],
        pids: Int[Tensor, " b"],
        step: int,
    ) -> TrainOutput:
        """The losses of one batch at optimiser step `step`, counted from 1."""
        # On an accelerator the question would wait for all work in its queue.
        if pids.device.type == "cpu" and bool((pids == pids[0]).all()):
            raise ValueError(f"expected two identities or more in a batch, got {int(pids[0])} only")
        image, chosen_patches = self._image(images, self.settings.saliency, step)
        text, chosen_words = self._text(ids, self.settings.saliency, step)
        global_ = self._branch(image.global_, text.global_, pids, "global")
        total = global_.tal + global_.cid + global_.id_
        local = None
        if self.settings.local:
            local = self._branch(image.local, text.local, pids, "grab")
            total = total + local.tal + local.cid + local.id_
        return TrainOutput(total, global_, local, image, text, chosen_patches, chosen_words)

    def _image(
        self, images: Float[Tensor, "b 3 y x"], source: str, step: int | None
    ) -> tuple[Embeddings, Bank | None]:
        tower = self.base_model.visual(
            images, self._maps_wanted(source, self.sizes.vision_depth), self.mode
        )
        global_ = tower.tokens[:, 0]
        if not self.settings.local:
            return Embeddings(global_, None), None
        cls = torch.zeros(len(images), dtype=torch.long, device=images.device)
        row = self._saliency(source, self.sizes.vision_depth, tower.maps, cls)
        bank = image_bank(row, bank_size(tower.tokens.shape[1] - 1, self.settings, step))
        return Embeddings(global_, self.visul_emb_layer(tower.tokens, bank, self.mode)), bank

    def _text(
        self, ids: Int[Tensor, "b t"], source: str, step: int | None
    ) -> tuple[Embeddings, Bank | None]:
        tower = self.base_model.text(
            ids, self._maps_wanted(source, self.sizes.text_depth), self.mode
        )
        eot = ids.argmax(dim=1)
        global_ = tower.tokens[torch.arange(len(ids), device=ids.device), eot]
        if not self.settings.local:
            return Embeddings(global_, None), None
        row = self._saliency(source, self.sizes.text_depth, tower.maps, eot)
        bank = text_bank(row, ids, bank_size(ids.shape[1] - 2, self.settings, step))
        return Embeddings(global_, self.texual_emb_layer(tower.tokens, bank, self.mode)), bank

    def _maps_wanted(self, source: str, depth: int) -> tuple[int, ...]:
        if self.mode == "published":
            return tuple(range(depth))
        if not self.settings.local:
            return ()
        return layers_read(source, depth, self.settings.mars_layers)

    def _saliency(
        self,
        source: str,
        depth: int,
        maps: dict[int, Float[Tensor, "b n n"]],
        position: Int[Tensor, " b"],
    ) -> Float[Tensor, "b n"]:
        read = layers_read(source, depth, self.settings.mars_layers)
        return saliency_row(
            source,
            {layer: maps[layer] for layer in read},
            position,
            discard=self.settings.mars_discard,
            mode=self.mode,
        )

    def _branch(
        self,
        image: Float[Tensor, "b e"],
        text: Float[Tensor, "b e"],
        pids: Int[Tensor, " b"],
        branch: Literal["global", "grab"],
    ) -> BranchLosses:
        if self.settings.mismatch_label == "extra_class":
            mismatch = pids.new_tensor(self.sizes.num_identities)
        else:
            mismatch = pids.max() + 1  # Often a real identity's class: the published code's choice.
        negatives = hard_negatives(image, text, pids, self.mode)
        pair_loss = cid(
            image,
            text,
            pids,
            negatives,
            mlp=getattr(self, f"mlp_{branch}"),
            classifier=getattr(self, f"classifier_{branch}"),
            mismatch=mismatch,
        )
        id_loss = identity(image, text, pids, classifier=getattr(self, f"classifier_id_{branch}"))
        return BranchLosses(tal(image, text, pids), pair_loss, id_loss, negatives)


def _pair_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2 * width, width), nn.LayerNorm(width), nn.GELU())


# Optimisation


class ParameterGroup(NamedTuple):
    """Rate before the epoch's factor, and coefficient of the L2 term in the gradient."""

    learning_rate: float
    weight_decay: float


def parameter_group(
    name: str,
    *,
    learning_rate: float = 1e-5,
    local_learning_rate: float = 1e-3,
    weight_decay: float = 4e-5,
) -> ParameterGroup:
    """The group of a parameter by its name: later rules override the rate, never the decay."""
    bias = "bias" in name
    rate = 2 * learning_rate if bias else learning_rate
    if "classifier" in name:
        rate = 5 * learning_rate
    if name.startswith(GRAB_LAYERS):
        rate = local_learning_rate
    return ParameterGroup(rate, 0.0 if bias else weight_decay)


def learning_rate_factor(epoch: int, *, num_epochs: int = 60, warmup_epochs: int = 5) -> float:
    """What multiplies every rate in epoch 1, 2, …: linear from 0.1, then half a cosine."""
    if epoch <= warmup_epochs:
        return 0.1 + 0.9 * (epoch - 1) / warmup_epochs
    progress = (epoch - 1 - warmup_epochs) / (num_epochs - warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """Adam with L2 decay inside the gradient, parameter groups, and a rate that changes per epoch.

    Parameters that get no gradient are not moved, not even by the decay. With a `precision` of
    bfloat16 the forward pass runs under autocast; parameters stay float32.
    """

    def __init__(
        self,
        twin: Twin,
        *,
        learning_rate: float = 1e-5,
        local_learning_rate: float = 1e-3,
        weight_decay: float = 4e-5,
        eps: float = 1e-3,
        num_epochs: int = 60,
        warmup_epochs: int = 5,
        precision: torch.dtype = torch.float32,
    ):
        self.twin, self.precision, self.learning_rate = twin, precision, learning_rate
        self.num_epochs, self.warmup_epochs = num_epochs, warmup_epochs
        members: dict[object, list[nn.Parameter]] = {}
        rates: dict[object, ParameterGroup] = {}
        for name, parameter in twin.named_parameters():
            group = parameter_group(
                name,
                learning_rate=learning_rate,
                local_learning_rate=local_learning_rate,
                weight_decay=weight_decay,
            )
            key = name if twin.mode == "published" else group
            rates[key] = group
            members.setdefault(key, []).append(parameter)
        self.optimizer = torch.optim.Adam(
            [
                {
                    "params": parameters,
                    "base_rate": rates[key].learning_rate,
                    "weight_decay": rates[key].weight_decay,
                }
                for key, parameters in members.items()
            ],
            betas=(0.9, 0.999),
            eps=eps,
            fused=twin.mode == "lean",
        )

    def train_step(
        self,
        images: Float[Tensor, "b 3 y x"],
        ids: Int[Tensor, "b t"],
        pids: Int[Tensor, " b"],
        step: int,
        epoch: int,
    ) -> StepMetrics:
        """One update; `step` and `epoch` count from 1. Switches the model to training."""
        factor = learning_rate_factor(
            epoch, num_epochs=self.num_epochs, warmup_epochs=self.warmup_epochs
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor
        self.twin.train()
        self.optimizer.zero_grad()
        reduced = self.precision != torch.float32
        with torch.autocast(images.device.type, dtype=self.precision, enabled=reduced):
            output = self.twin(images, ids, pids, step)
        output.total.backward()
        gradients = [p.grad for p in self.twin.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.optimizer.step()
        branches = [branch for branch in (output.global_, output.local) if branch is not None]
        return StepMetrics(
            step=step,
            epoch=epoch,
            loss=output.total.detach(),
            loss_tal=sum(branch.tal.detach() for branch in branches),
            loss_cid=sum((branch.cid + branch.id_).detach() for branch in branches),
            grad_norm=norm,
            learning_rate=self.learning_rate * factor,
            bank_image=0 if output.image_bank is None else output.image_bank.indices.shape[1],
            bank_text=0 if output.text_bank is None else output.text_bank.indices.shape[1],
        )

"""The compiled programs: the step (pictures and ids in, one Adam update out) and the encoders.

They need no data library.

`make` gathers what one step needs (model, optimiser, schedules) so that training, tests and
benchmarks run the very same step.
"""

import ctypes
import dataclasses
import functools
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from itself_jax import config as config_lib
from itself_jax import losses, optim, sharding
from itself_jax.data import batch as batch_lib
from itself_jax.models import grab, itself, saliency, transformer

# CLIP's statistics of RGB in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
_LARGE = 50_000_000  # parameters


class TrainState(NamedTuple):
    """Everything that training changes. `step` counts finished optimiser steps."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """This step's values, not means: the sums of method section 5 and what the schedules gave."""

    loss: Float[Array, ""]
    loss_tal: Float[Array, ""]
    loss_cid: Float[Array, ""]  # CID + ID, global + local
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]  # of the base group
    bank_image: Int[Array, ""]
    bank_text: Int[Array, ""]


class Loss(NamedTuple):
    """The total and what it was made of; `branches` is (global,) or (global, local)."""

    total: Float[Array, ""]
    branches: tuple[losses.BranchLosses, ...]
    batch_stats: Any


def compute_dtype(precision: str | None) -> jnp.dtype:
    """bfloat16 on TPU and GPU, float32 on CPU, unless `precision` says which."""
    if precision is None:
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def attention_kernel(attention: str | None, dtype: jnp.dtype) -> str:
    """cuDNN's on NVIDIA's cards from Ampere on, in 16-bit compute, unless `attention` says which.

    Everywhere else XLA's: the CPU's is as fast, and no TPU kernel has been tried.

    Raises:
      ConfigError: cuDNN's is asked for in float32, which is also what a CPU computes in.
    """
    if attention is None:
        capability = getattr(jax.local_devices()[0], "compute_capability", None)
        is_new = re.fullmatch(r"\d+\.\d+", str(capability)) and float(capability) >= 8.0
        attention = "cudnn" if is_new and dtype == jnp.bfloat16 else "plain"
    if attention == "cudnn" and dtype != jnp.bfloat16:
        raise config_lib.ConfigError(
            f"config.attention=cudnn computes in bfloat16, but this run in {dtype.name}: "
            "use config.precision=bfloat16 on a GPU, or config.attention=plain"
        )
    return attention


def prepare_images(
    pixels: UInt8[Array, "b y x 3"], erase: Int[Array, "b 4"] | None = None
) -> Float[Array, "b y x 3"]:
    """uint8 → CLIP's normalisation, then random erasing's boxes (top, left, height, width).

    A box is filled with CLIP's *mean* values after normalisation, which is what the reference does
    and not the mean colour; bytes cannot express it, so it happens here. Height 0 erases nothing.
    """
    mean, std = (np.array(x, np.float32).reshape(1, 1, 1, 3) for x in (IMAGE_MEAN, IMAGE_STD))
    images = (pixels.astype(jnp.float32) / 255 - mean) / std
    if erase is None:
        return images
    _, height, width, _ = pixels.shape
    top, left, tall, wide = (erase[:, i, None] for i in range(4))
    y, x = jnp.arange(height)[None], jnp.arange(width)[None]
    inside_y = (y >= top) & (y < top + tall)
    inside_x = (x >= left) & (x < left + wide)
    inside = inside_y[:, :, None] & inside_x[:, None, :]
    return jnp.where(inside[..., None], mean, images)


def encode(
    model: itself.ITSELF,
    variables: Any,
    images: Float[Array, "b y x 3"],
    ids: Int[Array, "b t"],
    k: itself.BankLimits,
) -> tuple[itself.Encoded, itself.Encoded, Any]:
    """Both towers in training mode: (image, text, BatchNorm statistics after this batch)."""

    def run(method: str, variables: Any, *inputs: Any) -> tuple[itself.Encoded, Any]:
        found, updated = model.apply(variables, *inputs, method=method, mutable=["batch_stats"])
        return found, {**variables, **updated}

    text, variables = run("encode_text", variables, ids, k.text)
    variables, text = _image_backward_first(variables, text)
    image, variables = run("encode_image", variables, images, k.image)
    return image, text, variables.get("batch_stats", {})


def _image_backward_first(variables: Any, text: itself.Encoded) -> tuple[Any, itself.Encoded]:
    """Both as they are; on a CPU no gradient goes into the text tower before the picture's is done.

    Its layers need more memory at once, so that fewer gradients should wait beside them.
    """
    params = variables["params"]
    encoder = params["image_encoder"]
    leaves, tree = jax.tree.flatten(text.embedding)
    # What the backward pass of pictures ends with.
    kernel, *leaves = transformer.together(encoder["patch_embedding"]["kernel"], *leaves)
    encoder = {**encoder, "patch_embedding": {"kernel": kernel}}
    text = text._replace(embedding=jax.tree.unflatten(tree, leaves))
    return {**variables, "params": {**params, "image_encoder": encoder}}, text


def sum_losses(
    model: itself.ITSELF,
    settings: config_lib.Loss,
    params: Any,
    image: itself.Embedding,
    text: itself.Embedding,
    pids: Int[Array, " b"],
    batch_stats: Any,
) -> Loss:
    """All loss terms of a batch of embeddings. `params` needs the heads alone."""
    mismatch = losses.mismatch_label(pids, model.num_identities, settings.mismatch_label)
    pairs = [(itself.HEADS[0], image.global_, text.global_)]
    if model.local.enabled:
        pairs.append((itself.HEADS[1], image.local, text.local))
    branches = []
    for name, image_embedding, text_embedding in pairs:
        heads = itself.IdentityHeads(model.num_identities + 1, image_embedding.shape[-1])
        bound = heads.bind({"params": params[name]})
        branches.append(
            losses.branch(
                image_embedding,
                text_embedding,
                pids,
                pair_logits=bound.pair_logits,
                identity_logits=bound.identity_logits,
                mismatch=mismatch,
                temperature=settings.temperature,
                margin=settings.margin,
            )
        )
    total = sum(sum(branch) for branch in branches)
    return Loss(total, tuple(branches), batch_stats)


class _Backward(NamedTuple):
    """A backward pass that has come as far as the embeddings.

    gradients: of the parameters behind them, by their first name.
    wanted: gradients of the loss by the embeddings.
    pull: makes of these the gradients of all other parameters.
    """

    loss: Loss
    gradients: dict[str, Any]
    wanted: Any
    pull: Callable[[Any], dict[str, Any]]


def _below(names: Collection[str], tree: Any) -> dict[str, Array]:
    """The leaves, by path, that lie below one of these keys."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if any(getattr(key, "key", None) in names for key in path)
    }


@dataclasses.dataclass(frozen=True)
class Training:
    """Model, optimiser and schedules of a run, and its step as a pure function."""

    config: config_lib.Config
    model: itself.ITSELF
    optimizer: optax.GradientTransformation
    bank_schedule: np.ndarray  # (s, 2) int32: k of images and texts
    rate_factors: np.ndarray  # (epochs + 1,) float64
    trained: Any  # tree of bool like the parameters: False for those without a gradient

    def init(self, seed: int) -> TrainState:
        """CLIP's own initialisation, a pure function of the seed."""
        model = self.model.model
        images = jnp.zeros((2, *model.image_size, 3))
        ids = jnp.zeros((2, model.text_length), jnp.int32)
        variables = self.model.init(jax.random.key(seed), images, ids)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=self.optimizer.init(variables["params"]),
        )

    def bank_limits(self, step: Int[Array, ""], epoch: Int[Array, ""]) -> itself.BankLimits:
        """k of optimiser step `step` (from 1), read from the table inside the compiled step."""
        position = epoch if self.config.local.ats_per_epoch else step
        table = jnp.asarray(self.bank_schedule)
        row = table[jnp.minimum(position, len(table) - 1)]
        return itself.BankLimits(row[0], row[1])

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        """One optimiser step. `batch` has images (uint8), erase, captions, pids and epoch."""
        step = state.step + 1
        k = self.bank_limits(step, batch.epoch)
        factor = jnp.asarray(self.rate_factors, jnp.float32)[batch.epoch]

        def updated(gradients: Any) -> tuple[Any, Any]:
            updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
            return jax.tree.map(lambda p, u: p + factor * u, state.params, updates), opt_state

        backward = self._backward(state, batch, k)
        # A third of all parameters are classifiers: on a CPU they are updated before the encoders'
        # backward pass, so that their gradients need not wait for its end in memory.
        first, loss = backward.gradients, backward.loss
        others = jax.tree.map(jnp.zeros_like, {**state.params})  # whose updates nobody takes
        done = _below(first, updated({**others, **first}))
        done, first_norm, wanted = transformer.all_first(
            (done, optax.tree.norm(first), backward.wanted)
        )
        rest = backward.pull(wanted)
        params, opt_state = jax.tree_util.tree_map_with_path(
            lambda path, x: done.get(jax.tree_util.keystr(path), x), updated({**first, **rest})
        )
        metrics = StepMetrics(
            loss=loss.total,
            loss_tal=sum(branch.tal for branch in loss.branches),
            loss_cid=sum(branch.cid + branch.id for branch in loss.branches),
            grad_norm=optax.tree.norm((first_norm, optax.tree.norm(rest))),
            learning_rate=factor * self.config.optim.learning_rate,
            bank_image=k.image,
            bank_text=k.text,
        )
        return TrainState(step, params, loss.batch_stats, opt_state), metrics

    def gradients(self, state: TrainState, batch: Any, k: itself.BankLimits) -> tuple[Any, Loss]:
        """Gradients of the loss by all parameters, zero for those that are not trained."""
        backward = self._backward(state, batch, k)
        return {**backward.gradients, **backward.pull(backward.wanted)}, backward.loss

    def _backward(self, state: TrainState, batch: Any, k: itself.BankLimits) -> "_Backward":
        """The pass up to the losses and back to the embeddings, and what leads on from there."""
        if self.config.micro_batches > 1:
            return self._backward_in_parts(state, batch, k)
        heads = {name: x for name, x in state.params.items() if name in itself.HEADS}
        below = {name: x for name, x in state.params.items() if name not in itself.HEADS}

        def embed(below: Any) -> tuple[tuple[itself.Embedding, itself.Embedding], Any]:
            variables = {"params": self._in_use(below), "batch_stats": state.batch_stats}
            images = prepare_images(batch.images, batch.erase)
            image, text, stats = encode(self.model, variables, images, batch.captions, k)
            return (image.embedding, text.embedding), stats

        embeddings, pull, batch_stats = jax.vjp(embed, below, has_aux=True)

        def loss_of(heads: Any, embeddings: Any) -> tuple[Float[Array, ""], Loss]:
            loss = sum_losses(
                self.model,
                self.config.loss,
                self._in_use(heads),
                *embeddings,
                batch.pids,
                batch_stats,
            )
            return loss.total, loss

        (gradients, wanted), loss = jax.grad(loss_of, (0, 1), has_aux=True)(heads, embeddings)
        return _Backward(loss, gradients, wanted, lambda wanted: pull(wanted)[0])

    def _backward_in_parts(
        self, state: TrainState, batch: Any, k: itself.BankLimits
    ) -> "_Backward":
        """The same, with one micro-batch's activations in memory at a time.

        The losses look across the whole batch, so the batch is encoded twice (an idea of
        GradCache). First without gradients, to keep of every token sequence its global embedding
        and bank rows; losses and GRAB run on those and give their gradients. Then, micro-batch by
        micro-batch, with these gradients and the banks already chosen.
        """
        model, parts = self.model, self.config.micro_batches
        is_tower = {name: name.endswith("_encoder") for name in state.params}
        towers = {name: x for name, x in state.params.items() if is_tower[name]}
        others = {name: x for name, x in state.params.items() if not is_tower[name]}
        inputs = jax.tree.map(
            lambda x: sharding.split_rows(x, parts), (batch.images, batch.erase, batch.captions)
        )

        def select(
            towers: Any, part: Any, banks: Any = (None, None)
        ) -> tuple[itself.Selected, itself.Selected]:
            pixels, erase, ids = part

            def both(module: itself.ITSELF) -> tuple[itself.Selected, itself.Selected]:
                images = prepare_images(pixels, erase)
                return (
                    module.select_image(images, k.image, banks[0]),
                    module.select_text(ids, k.text, banks[1]),
                )

            return nn.apply(both, model)({"params": self._in_use(towers)})

        def features(both: tuple[itself.Selected, itself.Selected]) -> Any:
            return tuple((side.global_, side.rows) for side in both)

        chosen = jax.lax.map(lambda part: select(towers, part), inputs)
        banks = tuple(side.bank for side in chosen)
        whole_banks = tuple(_join_bank(bank) for bank in banks)

        def losses_of(others: Any, cached: Any) -> tuple[Float[Array, ""], Loss]:
            others = self._in_use(others)
            embeddings, batch_stats = [], {}
            for side, bank, (global_, rows) in zip(
                ("image_grab", "text_grab"), whole_banks, cached, strict=True
            ):
                local = None
                if bank is not None:
                    variables = {"params": others[side], "batch_stats": state.batch_stats[side]}
                    head = itself.grab_head(model.local, model.dtype, image=side == "image_grab")
                    local, batch_stats[side] = grab.embed_in_chunks(
                        head, variables, rows, bank, parts
                    )
                embeddings.append(itself.Embedding(global_, local))
            loss = sum_losses(model, self.config.loss, others, *embeddings, batch.pids, batch_stats)
            return loss.total, loss

        cached = jax.tree.map(sharding.join_rows, features(chosen))
        (gradients, wanted), loss = jax.grad(losses_of, argnums=(0, 1), has_aux=True)(
            others, cached
        )
        kept = tuple(bank and bank.kept for bank in whole_banks)
        of_rows = tuple(bank and (bank.indices, bank.valid) for bank in banks)

        def pull_all(whole: tuple[Any, Any], *parts: Any) -> Any:
            towers, kept = whole

            def add(total: Any, part: Any) -> tuple[Any, None]:
                inputs, of_rows, wanted = part
                banks = tuple(
                    own and saliency.Bank(own[0], k, own[1])
                    for k, own in zip(kept, of_rows, strict=True)
                )
                _, pull = jax.vjp(lambda towers: features(select(towers, inputs, banks)), towers)
                return jax.tree.map(jnp.add, total, pull(wanted)[0]), None

            return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, towers), parts)[0]

        def pull(wanted: Any) -> Any:
            wanted = jax.tree.map(lambda x: sharding.split_rows(x, parts), wanted)
            # With fsdp each part's sum is spread at once: no gradient is whole anywhere.
            if self.config.sharding == "fsdp":
                return pull_all((towers, kept), inputs, of_rows, wanted)
            return sharding.sum_over_rows(pull_all, (towers, kept), inputs, of_rows, wanted)

        return _Backward(loss, gradients, wanted, pull)

    def _in_use(self, params: Any) -> Any:
        """Parameters as the computation needs them; those that are not trained as constants."""
        trained = {name: self.trained[name] for name in params}
        params = jax.tree.map(
            lambda x, t: x if t else jax.lax.stop_gradient(x), dict(params), trained
        )
        return sharding.in_use(params, self.config.sharding)

    def encode_images(self, variables: Any, pixels: UInt8[Array, "b y x 3"]) -> itself.Embedding:
        """Pictures → embeddings as evaluation uses them."""
        images = prepare_images(pixels)
        return self.model.apply(self._gathered(variables), images, method="encode_image").embedding

    def encode_captions(self, variables: Any, ids: Int[Array, "b t"]) -> itself.Embedding:
        """Token ids → embeddings as evaluation uses them."""
        return self.model.apply(self._gathered(variables), ids, method="encode_text").embedding

    def attend(self, variables: Any, batch: Any, *, side: str) -> itself.Attended:
        """Pictures (`side="image"`) or token ids ("text") → what the tower looks at.

        The first axis is that of `itself.attention_sources`.
        """
        sources = itself.attention_sources(self.config.model, self.config.local).values()
        chosen = tuple(pair[0 if side == "image" else 1] for pair in sources)
        batch = prepare_images(batch) if side == "image" else batch
        return self.model.apply(self._gathered(variables), batch, chosen, method=f"attend_{side}")

    def _gathered(self, variables: Any) -> Any:
        params = sharding.in_use(variables["params"], self.config.sharding)
        return {**variables, "params": params}


def _join_bank(bank: saliency.Bank | None) -> saliency.Bank | None:
    """The bank of a batch from those of its parts, which have the same k."""
    if bank is None:
        return None
    indices, valid = sharding.join_rows(bank.indices), sharding.join_rows(bank.valid)
    return saliency.Bank(indices, bank.kept[0], valid)


def make(
    config: config_lib.Config, *, num_identities: int, steps_per_epoch: tuple[int, ...]
) -> Training:
    """Builds model, optimiser and schedules once, outside of any compiled function.

    steps_per_epoch: exact optimiser steps of each epoch, for a horizon that counts epochs.
    """
    dtype = compute_dtype(config.precision)
    model = itself.ITSELF(
        config.model,
        config.local,
        num_identities,
        dtype,
        config.remat,
        attention_kernel(config.attention, dtype),
    )
    shapes = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0),
            jnp.zeros((2, *config.model.image_size, 3)),
            jnp.zeros((2, config.model.text_length), jnp.int32),
        )
    )
    return Training(
        config=config,
        model=model,
        optimizer=optim.adam(shapes["params"], config.optim, freeze_layers=config.freeze_layers),
        bank_schedule=bank_schedule(config, steps_per_epoch),
        rate_factors=optim.learning_rate_factors(config.num_epochs, config.warmup_epochs),
        trained=optim.groups(
            shapes["params"], config.optim, freeze_layers=config.freeze_layers
        ).trained,
    )


def bank_schedule(
    config: config_lib.Config, steps_per_epoch: tuple[int, ...]
) -> Int[np.ndarray, "s 2"]:
    """k of images and texts by optimiser step (or by epoch with `local.ats_per_epoch`)."""
    local = config.local
    candidates = itself.candidates(config.model)
    if not (local.enabled and local.ats):
        return np.array([itself.bank_limits(config.model, local, True)], np.int32)
    horizon = horizon_steps(local.ats_horizon_steps, steps_per_epoch)
    if local.ats_per_epoch:
        ends = np.cumsum(steps_per_epoch)
        horizon = int(np.searchsorted(ends, horizon) + 1)  # the epoch in which the horizon lies
    return np.stack(
        [
            saliency.bank_schedule(n, start=local.ratio_start, end=local.ratio_end, horizon=horizon)
            for n in candidates
        ],
        axis=1,
    )


def horizon_steps(horizon: int | str, steps_per_epoch: tuple[int, ...]) -> int:
    """ATS's T in optimiser steps; "10ep" is the end of the tenth epoch, exactly."""
    if isinstance(horizon, int):
        return horizon
    if not horizon.endswith("ep"):
        return int(horizon)
    epochs = int(horizon.removesuffix("ep"))
    mean = sum(steps_per_epoch) / len(steps_per_epoch)
    beyond = max(0, epochs - len(steps_per_epoch))
    return sum(steps_per_epoch[:epochs]) + round(beyond * mean)


def state_template(training: Training, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, types and places of everything that training changes."""
    shapes = jax.eval_shape(lambda: training.init(0))
    places = sharding.place(mesh, shapes, training.config.sharding).stored
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def init_state(training: Training, template: TrainState, seed: int) -> TrainState:
    """A fresh state where `template` wants it."""
    places = jax.tree.map(lambda x: x.sharding, template)
    state = jax.jit(training.init, static_argnums=0, out_shardings=places)(seed)
    jax.block_until_ready(state)
    give_back_memory()
    return state


def give_back_memory() -> None:
    """Returns to the system what its allocator keeps of memory that is free again.

    Compilers and initialisation need much, for once: of ViT-B/16 on a CPU, 0.65 and 2.2 GB stayed
    resident for the rest of the run. Only glibc is asked; others have other ways.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


def batch_template(config: config_lib.Config, mesh: jax.sharding.Mesh) -> batch_lib.Batch:
    """Shapes, types and places of a global batch."""
    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    b = config.batch_size

    def array(shape: tuple[int, ...], dtype: Any, place: Any = rows) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    return batch_lib.Batch(
        images=array((b, *config.model.image_size, 3), np.uint8),
        erase=array((b, 4), np.int32),
        captions=array((b, config.model.text_length), np.int32),
        pids=array((b,), np.int32),
        epoch=array((), np.int32, whole),
    )


def compile_step(
    training: Training, template: TrainState, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
    """The train step for exactly one batch shape: another shape is an error, not a compilation."""
    places = jax.tree.map(lambda x: x.sharding, template)
    step = jax.jit(
        training.step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh))
    )
    with jax.set_mesh(mesh):
        lowered = step.lower(template, batch_template(training.config, mesh))
        platform = mesh.devices.flat[0].platform
        compiled = lowered.compile(compiler_options=_compiler_options(template.params, platform))
    del lowered
    give_back_memory()
    return compiled


def _compiler_options(params: Any, platform: str) -> dict[str, Any] | None:
    """What the compiler does not find out by itself.

    A CPU's runs operations side by side, at the cost of memory, and drops all barriers (of
    `jax.checkpoint`, too, and of `transformer.together`) before it puts operations in order. That
    makes the steps of small models faster; each operation of a large one keeps all cores busy
    alone. Nothing else needs the pass that drops barriers.
    """
    if platform == "cpu" and sum(x.size for x in jax.tree.leaves(params)) >= _LARGE:
        return {
            "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
            "xla_disable_hlo_passes": "cse_barrier_expander",
        }
    return None


def compile_encoders(
    training: Training, variables: Any, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Image and text encoder for batches of `eval.batch_size`; every host gets all embeddings.

    The text encoder takes captions of the lengths of `itself.caption_lengths`.

    variables: shapes and places of "params" and "batch_stats"; classifiers may be absent.
    """
    lengths = itself.caption_lengths(training.config.model, training.config.local)
    of_length = {t: compile_text_encoder(training, variables, mesh, t) for t in lengths}
    return (
        compile_image_encoder(training, variables, mesh),
        lambda variables, ids: of_length[ids.shape[1]](variables, ids),
    )


def compile_image_encoder(
    training: Training, variables: Any, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
    """As `compile_encoders`: (variables, pixels) → embeddings."""
    shape = (*training.config.model.image_size, 3)
    return _compile_encoder(training, training.encode_images, variables, mesh, shape, np.uint8)


def compile_text_encoder(
    training: Training, variables: Any, mesh: jax.sharding.Mesh, length: int | None = None
) -> Callable[..., Any]:
    """As `compile_encoders`: (variables, token ids) → embeddings.

    length: of a caption, at most and by default `text_length`.
    """
    shape = (length or training.config.model.text_length,)
    return _compile_encoder(training, training.encode_captions, variables, mesh, shape, np.int32)


def compile_attention(
    training: Training, variables: Any, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """As `compile_encoders`, but to what each tower looks at (`itself.Attended`).

    Captions have `text_length` here. Classifiers and the local branch may be absent.
    """
    model = training.config.model
    programs = []
    for side, shape, dtype in (
        ("image", (*model.image_size, 3), np.uint8),
        ("text", (model.text_length,), np.int32),
    ):
        attend = functools.partial(training.attend, side=side)
        programs.append(_compile_encoder(training, attend, variables, mesh, shape, dtype))
    return programs[0], programs[1]


def _compile_encoder(
    training: Training,
    encode: Callable[..., Any],
    variables: Any,
    mesh: jax.sharding.Mesh,
    shape: tuple[int, ...],
    dtype: Any,
) -> Callable[..., Any]:
    b = sharding.eval_batch_size(training.config, mesh)
    batch = jax.ShapeDtypeStruct((b, *shape), dtype, sharding=sharding.batch(mesh))
    with jax.set_mesh(mesh):
        jitted = jax.jit(encode, out_shardings=sharding.replicated(mesh))
        return jitted.lower(variables, batch).compile()

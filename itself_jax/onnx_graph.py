"""Writes a function of JAX as an ONNX graph: what our encoders are made of, and nothing else.

`translate` reads the function's jaxpr. Each primitive has one rule in `_RULES`; one without a rule,
or in a form that its rule does not know, is an error that names it, never a guess. What depends on
weights alone is computed at once and stored. Operators are those of opset 18, all of which any
runtime of the last years has.

One axis, the batch, is symbolic. A value of the jaxpr may be smaller in the graph: broadcasting is
left to the operators, as in NumPy, and `_Graph.full` makes the rest true where one needs it.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.extend.core
import numpy as np
import onnx

from itself_jax.models import saliency

OPSET = 18
_IR_VERSION = 8  # the first one that has opset 18
_LIMIT = 2**31 - 2**24  # bytes of a protobuf file, less the graph's own
_ALIGNMENT = 4096  # of arrays in their own file, so that a runtime can map them


class OnnxError(RuntimeError):
    """The function cannot be written as ONNX; the message says what in it."""


class Translated(NamedTuple):
    """A graph and the arrays that it names, not yet one file."""

    model: onnx.ModelProto
    arrays: dict[str, np.ndarray]


class _Value(NamedTuple):
    """What stands for a variable of the jaxpr: an array, or a name in the graph.

    shape: of what is there; it broadcasts to the shape that the jaxpr says, of the same rank.
    name: in the graph; of an array, the weight that it was made from.
    """

    shape: tuple[Any, ...]
    dtype: np.dtype
    name: str
    array: np.ndarray | None = None


def translate(
    function: Callable[..., Mapping[str, jax.Array]],
    weights: Mapping[str, jax.Array],
    argument: jax.ShapeDtypeStruct,
    *,
    name: str,
    as_dtype: Any = None,
) -> Translated:
    """The graph of `function(weights, argument)`, with the weights inside.

    Args:
      function: returns named arrays, whose first axis is the batch.
      weights: by name.
      argument: shape and type of the one input; its first axis is symbolic.
      name: of that input in the graph.
      as_dtype: type of the input in the graph, where it is another; it is cast.

    Raises:
      OnnxError: the function has something in it that is not known here.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(dict(weights), argument)
    graph = _Graph(argument.shape[0])
    given = _Value(argument.shape, np.dtype(as_dtype or argument.dtype), name)
    graph.batch_of = name
    inputs = [_known(np.asarray(weights[key]), key) for key in sorted(weights)]
    inputs.append(graph.cast(given, argument.dtype))
    outputs = graph.run(closed.jaxpr, [_known(x) for x in closed.consts], inputs)
    names = sorted(shapes)
    for key, value in zip(names, outputs, strict=True):
        graph.nodes.append(
            onnx.helper.make_node("Identity", [graph.full(value, shapes[key].shape)], [key])
        )
    nodes = _needed(graph.nodes, names)
    used = {i for node in nodes for i in node.input}
    arrays = {key: array for key, array in graph.arrays.items() if key in used}
    proto = onnx.helper.make_graph(
        nodes,
        "itself_jax",
        [_declare(name, given.shape, given.dtype)],
        [_declare(key, shapes[key].shape, shapes[key].dtype) for key in names],
    )
    model = onnx.helper.make_model(
        proto,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="itself_jax",
    )
    return Translated(model, arrays)


def write(translated: Translated, path: pathlib.Path, *, limit: int = _LIMIT) -> list[pathlib.Path]:
    """Writes `path`, and `path`.data beside it where the arrays exceed what protobuf can hold.

    Returns:
      The files that were written.

    Raises:
      OSError: they cannot be written.
    """
    model = onnx.ModelProto()
    model.CopyFrom(translated.model)
    if sum(array.nbytes for array in translated.arrays.values()) <= limit:
        for name, array in translated.arrays.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        path.write_bytes(model.SerializeToString())
        return [path]
    beside = path.with_name(f"{path.name}.data")
    with beside.open("wb") as file:
        for name, array in translated.arrays.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            tensor = model.graph.initializer.add(name=name, dims=array.shape)
            tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": beside.name, "offset": file.tell(), "length": array.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(np.ascontiguousarray(array).data)
    path.write_bytes(model.SerializeToString())
    return [path, beside]


class _Graph:
    """Nodes and arrays as they come into being."""

    def __init__(self, batch: Any):
        self.batch = batch  # the symbolic size
        self.batch_of = ""  # the input that has it
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}
        self._batch_size: str | None = None
        self._count = 0

    def run(self, jaxpr: Any, consts: Sequence[_Value], inputs: Sequence[_Value]) -> list[_Value]:
        """Translates every equation, in order."""
        found: dict[Any, _Value] = {}

        def read(variable: Any) -> _Value:
            if isinstance(variable, jax.extend.core.Literal):
                return _known(np.asarray(variable.val, variable.aval.dtype))
            return found[variable]

        found.update(zip(jaxpr.constvars, consts, strict=True))
        found.update(zip(jaxpr.invars, inputs, strict=True))
        for equation in jaxpr.eqns:
            values = [read(variable) for variable in equation.invars]
            found.update(zip(equation.outvars, self._apply(equation, values), strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _apply(self, equation: Any, values: list[_Value]) -> Sequence[_Value]:
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        name = equation.primitive.name
        if name == "jit" and equation.params["name"] == saliency.lowest.__name__:
            return [_lowest(self, equation, *values)]
        if inner is not None and name in ("jit", "custom_jvp_call", "custom_vjp_call", "remat2"):
            consts = [_known(x) for x in getattr(inner, "consts", ())]
            return self.run(getattr(inner, "jaxpr", inner), consts, values)
        if _is_constant(equation, values):
            results = equation.primitive.bind(*(v.array for v in values), **equation.params)
            results = results if equation.primitive.multiple_results else [results]
            weight = next((v.name for v in values if v.name), "")
            return [_known(np.asarray(result), weight) for result in results]
        if name not in _RULES:
            raise OnnxError(f"the operation {name!r} has no rule in onnx_graph")
        results = _RULES[name](self, equation, *values)
        return [results] if isinstance(results, _Value) else results

    def add(
        self, operator: str, *inputs: str, count: int = 1, **attributes: Any
    ) -> str | list[str]:
        """Appends a node and names its outputs."""
        self._count += 1
        outputs = [f"{operator.lower()}_{self._count}" + f"_{i}" * bool(i) for i in range(count)]
        self.nodes.append(
            onnx.helper.make_node(operator, inputs, outputs, outputs[0], **attributes)
        )
        return outputs[0] if count == 1 else outputs

    def name(self, value: _Value) -> str:
        """The value's name in the graph; an array is stored there first."""
        if value.array is None:
            return value.name
        name, number = value.name or "constant", 0
        while (there := self.arrays.get(name)) is not None and not _same(there, value.array):
            number += 1
            name = f"{value.name or 'constant'}.{number}"
        self.arrays[name] = value.array
        return name

    def constant(self, *values: Any) -> str:
        """The name of a list of integers: axes, sizes, indices."""
        return self.name(_known(np.array(values, np.int64)))

    def full(self, value: _Value, shape: Sequence[Any]) -> str:
        """The value's name, in the shape that the jaxpr says."""
        if value.shape == tuple(shape):
            return self.name(value)
        if value.array is not None and all(_is_number(n) for n in shape):
            return self.name(_known(np.broadcast_to(value.array, shape), value.name))
        return self.add("Expand", self.name(value), self._sizes(shape))

    def _sizes(self, shape: Sequence[Any]) -> str:
        parts = []
        for size in shape:
            if _is_number(size):
                parts.append(self.constant(size))
                continue
            if size != self.batch:
                raise OnnxError(f"a shape holds {size}, which is not the batch")
            if self._batch_size is None:
                self._batch_size = self.add("Shape", self.batch_of, start=0, end=1)
            parts.append(self._batch_size)
        return self.add("Concat", *parts, axis=0)

    def cast(self, value: _Value, dtype: Any) -> _Value:
        dtype = np.dtype(dtype)
        if value.dtype == dtype:
            return value
        to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return _Value(value.shape, dtype, self.add("Cast", self.name(value), to=to))

    def transposed(self, value: _Value, order: Sequence[int]) -> _Value:
        if list(order) == list(range(len(value.shape))):
            return value
        if value.array is not None:
            return _known(np.transpose(value.array, order), value.name)
        name = self.add("Transpose", value.name, perm=list(order))
        return _Value(tuple(value.shape[i] for i in order), value.dtype, name)

    def where(self, condition: str, one: str, other: str, dtype: np.dtype) -> str:
        """Elementwise choice; ONNX Runtime has no `Where` over booleans."""
        if dtype != np.bool_:
            return self.add("Where", condition, one, other)
        chosen = self.add("And", condition, one)
        return self.add("Or", chosen, self.add("And", self.add("Not", condition), other))


def _is_number(size: Any) -> bool:
    return not jax.export.is_symbolic_dim(size)


def _known(array: Any, name: str = "") -> _Value:
    array = np.asarray(array)
    return _Value(array.shape, array.dtype, name, array)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one is other or (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


def _is_constant(equation: Any, values: Sequence[_Value]) -> bool:
    """Whether it can be computed now: arrays as large as the jaxpr says, and no batch in it."""
    shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
    sizes = [*equation.params.values(), *(n for shape in shapes for n in shape)]
    return all(map(_is_number, sizes)) and all(
        value.array is not None and value.shape == shape
        for value, shape in zip(values, shapes, strict=False)
    )


def _declare(name: str, shape: Sequence[Any], dtype: Any) -> onnx.ValueInfoProto:
    sizes = [n if _is_number(n) else str(n) for n in shape]
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return onnx.helper.make_tensor_value_info(name, kind, sizes)


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that outputs depend on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _out(equation: Any, name: str, shape: Sequence[Any] | None = None) -> _Value:
    """The equation's one result."""
    aval = equation.outvars[0].aval
    return _Value(tuple(aval.shape if shape is None else shape), np.dtype(aval.dtype), name)


def _expect(condition: bool, equation: Any) -> None:
    if not condition:
        raise OnnxError(
            f"the operation {equation.primitive.name!r} has a form that onnx_graph does not know: "
            f"{equation}"
        )


# --- rules: (graph, equation, values) → value or values ---------------------------------------


def _elementwise(*operators: str) -> Callable[..., _Value]:
    """Operators one after the other, the first over all values."""

    def rule(graph: _Graph, equation: Any, *values: _Value) -> _Value:
        booleans = [np.dtype(v.aval.dtype) == np.bool_ for v in equation.invars]
        if operators[0] in ("And", "Or", "Not"):  # JAX's are bitwise over integers
            known = all(booleans)
        else:
            known = operators[0] == "Equal" or not any(booleans)
        _expect(known, equation)
        name = graph.add(operators[0], *map(graph.name, values))
        for operator in operators[1:]:
            name = graph.add(operator, name)
        return _out(equation, name, _broadcast(values))

    return rule


def _broadcast(values: Sequence[_Value]) -> tuple[Any, ...]:
    rank = max(len(value.shape) for value in values)
    padded = [(1,) * (rank - len(v.shape)) + tuple(v.shape) for v in values]
    return tuple(next((n for n in axis if n != 1), 1) for axis in zip(*padded, strict=True))


def _square(graph: _Graph, equation: Any, x: _Value) -> _Value:
    name = graph.name(x)
    return _out(equation, graph.add("Mul", name, name), x.shape)


def _erfc(graph: _Graph, equation: Any, x: _Value) -> _Value:
    one = graph.name(_known(np.ones((), x.dtype)))
    return _out(equation, graph.add("Sub", one, graph.add("Erf", graph.name(x))), x.shape)


def _select(graph: _Graph, equation: Any, which: _Value, *cases: _Value) -> _Value:
    _expect(which.dtype == np.bool_ and len(cases) == 2, equation)
    no, yes = (graph.name(case) for case in cases)
    name = graph.where(graph.name(which), yes, no, cases[0].dtype)
    return _out(equation, name, _broadcast([which, *cases]))


def _same_value(graph: _Graph, equation: Any, x: _Value) -> _Value:
    return x


def _convert(graph: _Graph, equation: Any, x: _Value) -> _Value:
    return graph.cast(x, equation.params["new_dtype"])


def _reduce(operator: str) -> Callable[..., _Value]:
    def rule(graph: _Graph, equation: Any, x: _Value) -> _Value:
        name = graph.full(x, equation.invars[0].aval.shape)
        axes = graph.constant(*equation.params["axes"])
        return _out(equation, graph.add(operator, name, axes, keepdims=0))

    return rule


def _argmax(graph: _Graph, equation: Any, x: _Value) -> _Value:
    (axis,) = equation.params["axes"]
    name = graph.full(x, equation.invars[0].aval.shape)
    found = _out(equation, graph.add("ArgMax", name, axis=axis, keepdims=0))
    return graph.cast(found._replace(dtype=np.dtype(np.int64)), found.dtype)


def _top_k(graph: _Graph, equation: Any, x: _Value) -> list[_Value]:
    shape = equation.invars[0].aval.shape
    axis = equation.params.get("axis", len(shape) - 1)
    # As in JAX, the lower index comes first among equals.
    values, indices = graph.add(
        *("TopK", graph.full(x, shape), graph.constant(equation.params["k"])), axis=axis, count=2
    )
    top, positions = equation.outvars
    found = _Value(positions.aval.shape, np.dtype(np.int64), indices)
    return [_out(equation, values, top.aval.shape), graph.cast(found, positions.aval.dtype)]


def _lowest(graph: _Graph, equation: Any, x: _Value, count: _Value) -> _Value:
    """`saliency.lowest`: the indices of the lowest, then a mask that is true there."""
    _expect(count.array is not None, equation)
    shape = equation.outvars[0].aval.shape
    name = graph.full(x, shape)
    _, indices = graph.add(
        *("TopK", name, graph.constant(int(count.array))), axis=1, largest=0, count=2
    )
    no, yes = (graph.name(_known(np.array([value]))) for value in (False, True))
    mask = graph.add("Expand", no, graph.add("Shape", name))
    marks = graph.add("Expand", yes, graph.add("Shape", indices))
    return _out(equation, graph.add("ScatterElements", mask, indices, marks, axis=1))


def _concatenate(graph: _Graph, equation: Any, *values: _Value) -> _Value:
    names = (graph.full(v, i.aval.shape) for v, i in zip(values, equation.invars, strict=True))
    return _out(equation, graph.add("Concat", *names, axis=equation.params["dimension"]))


def _stack(graph: _Graph, equation: Any, *values: _Value) -> _Value:
    axis = equation.params["axis"]
    names = [
        graph.add("Unsqueeze", graph.full(v, i.aval.shape), graph.constant(axis))
        for v, i in zip(values, equation.invars, strict=True)
    ]
    return _out(equation, graph.add("Concat", *names, axis=axis))


def _split(graph: _Graph, equation: Any, x: _Value) -> list[_Value]:
    sizes, axis = equation.params["sizes"], equation.params["axis"]
    name = graph.full(x, equation.invars[0].aval.shape)
    names = graph.add("Split", name, graph.constant(*sizes), axis=axis, count=len(sizes))
    return [
        _Value(out.aval.shape, x.dtype, name)
        for out, name in zip(equation.outvars, names, strict=True)
    ]


def _transpose(graph: _Graph, equation: Any, x: _Value) -> _Value:
    return graph.transposed(x, equation.params["permutation"])


def _reshape(graph: _Graph, equation: Any, x: _Value) -> _Value:
    sizes = [n if _is_number(n) else -1 for n in equation.params["new_sizes"]]
    _expect(equation.params["dimensions"] is None and sizes.count(-1) < 2, equation)
    name = graph.full(x, equation.invars[0].aval.shape)
    return _out(equation, graph.add("Reshape", name, graph.constant(*sizes)))


def _broadcast_in_dim(graph: _Graph, equation: Any, x: _Value) -> _Value:
    """New axes of size 1; whoever needs more of them expands."""
    places = equation.params["broadcast_dimensions"]
    new = [i for i in range(len(equation.params["shape"])) if i not in places]
    if not new:
        return x
    shape = [1] * len(equation.params["shape"])
    for place, size in zip(places, x.shape, strict=True):
        shape[place] = size
    if x.array is not None:
        return _known(x.array.reshape(shape), x.name)
    return _out(equation, graph.add("Unsqueeze", x.name, graph.constant(*new)), shape)


def _squeeze(graph: _Graph, equation: Any, x: _Value) -> _Value:
    axes = graph.constant(*equation.params["dimensions"])
    name = graph.full(x, equation.invars[0].aval.shape)
    return _out(equation, graph.add("Squeeze", name, axes))


def _slice(graph: _Graph, equation: Any, x: _Value) -> _Value:
    shape = equation.invars[0].aval.shape
    starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
    steps = equation.params["strides"] or (1,) * len(shape)
    cut = [
        axis
        for axis, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True))
        if (start, stop, step) != (0, shape[axis], 1)
    ]
    _expect(all(_is_number(shape[axis]) for axis in cut), equation)
    ranges = ([x[axis] for axis in cut] for x in (starts, stops, range(len(shape)), steps))
    name = graph.full(x, shape)
    return _out(equation, graph.add("Slice", name, *(graph.constant(*r) for r in ranges)))


def _dot(graph: _Graph, equation: Any, left: _Value, right: _Value) -> _Value:
    """(batch, rows, contracted) times (batch, contracted, columns), in JAX's order of results."""
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    shapes = [variable.aval.shape for variable in equation.invars]
    rows = [i for i in range(len(shapes[0])) if i not in (*left_sum, *left_batch)]
    columns = [i for i in range(len(shapes[1])) if i not in (*right_sum, *right_batch)]
    # Without a batch, `MatMul` takes any number of rows' axes.
    few = len(rows) == 1 or (rows and not left_batch)
    _expect(len(left_sum) == len(columns) == 1 and bool(few), equation)
    values = []
    orders = ([*left_batch, *rows, *left_sum], [*right_batch, *right_sum, *columns])
    for value, shape, order in zip((left, right), shapes, orders, strict=True):
        whole = value._replace(shape=shape)
        if value.shape != shape:
            whole = whole._replace(name=graph.full(value, shape), array=None)
        # A product of two halves may be asked for in full precision.
        values.append(graph.cast(graph.transposed(whole, order), equation.outvars[0].aval.dtype))
    return _out(equation, graph.add("MatMul", *map(graph.name, values)))


def _convolution(graph: _Graph, equation: Any, x: _Value, kernel: _Value) -> _Value:
    params = equation.params
    numbers = params["dimension_numbers"]
    _expect(
        params["batch_group_count"] == params["feature_group_count"] == 1
        and set(params["lhs_dilation"]) == set(params["rhs_dilation"]) == {1}
        and x.shape == equation.invars[0].aval.shape,
        equation,
    )
    before, after = zip(*params["padding"], strict=True)
    name = graph.add(
        "Conv",
        graph.name(graph.transposed(x, numbers.lhs_spec)),
        graph.name(graph.transposed(kernel, numbers.rhs_spec)),
        strides=params["window_strides"],
        pads=[*before, *after],
    )
    out = _out(equation, name)
    shape = tuple(out.shape[i] for i in numbers.out_spec)
    return graph.transposed(out._replace(shape=shape), np.argsort(numbers.out_spec).tolist())


def _gather(graph: _Graph, equation: Any, x: _Value, indices: _Value) -> _Value:
    """Picks whole slices along axes: `x[ids]`, `x[:, 0]`, `take_along_axis`.

    JAX fills with NaN what lies outside; ONNX Runtime stops there.
    """
    numbers, params = equation.params["dimension_numbers"], equation.params
    shape, places = (variable.aval.shape for variable in equation.invars)
    picked, shared = numbers.start_index_map, numbers.operand_batching_dims
    rest = [i for i in range(len(shape)) if i not in (*picked, *shared)]
    _expect(
        params["mode"] != jax.lax.GatherScatterMode.CLIP
        and set(numbers.collapsed_slice_dims) == set(picked)
        and all(params["slice_sizes"][i] == shape[i] for i in rest),
        equation,
    )
    # Axes are followed by labels: of `x` by its number, of `indices` by -1 - its number.
    loops = [i for i in range(len(places) - 1) if i not in numbers.start_indices_batching_dims]
    whole = _Value(tuple(places), indices.dtype, graph.full(indices, places))
    whole = graph.cast(whole, np.int64)
    source = _Value(tuple(shape), x.dtype, graph.full(x, shape))
    if not shared and len(picked) == 1:
        name = graph.add("Squeeze", whole.name, graph.constant(len(places) - 1))
        name = graph.add("Gather", source.name, name, axis=picked[0])
        before = [i for i in rest if i < picked[0]]
        labels = [*before, *(-1 - i for i in loops), *rest[len(before) :]]
    else:
        order = [*numbers.start_indices_batching_dims, *loops, len(places) - 1]
        name = graph.add(
            "GatherND",
            graph.transposed(source, [*shared, *picked, *rest]).name,
            graph.transposed(whole, order).name,
            batch_dims=len(shared),
        )
        labels = [-1 - i for i in order[:-1]] + rest
    offsets, others = iter(rest), iter(range(len(places) - 1))
    wanted = [
        next(offsets) if i in numbers.offset_dims else -1 - next(others) for i in range(len(labels))
    ]
    out = _out(equation, name)
    sizes = dict(zip(wanted, out.shape, strict=True))
    found = out._replace(shape=tuple(sizes[label] for label in labels))
    return graph.transposed(found, [labels.index(label) for label in wanted])


def _scatter(graph: _Graph, equation: Any, x: _Value, index: _Value, update: _Value) -> _Value:
    """`x.at[:, 3].set(…)`: one position of one axis, known in advance."""
    numbers = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    _expect(
        index.array is not None
        and index.array.size == 1
        and equation.params["update_jaxpr"] is None
        and len(numbers.inserted_window_dims) == 1
        and numbers.inserted_window_dims == numbers.scatter_dims_to_operand_dims
        and len(numbers.update_window_dims) == len(shape) - 1,
        equation,
    )
    (axis,) = numbers.inserted_window_dims
    (at,) = index.array.reshape(-1).tolist()
    mask = np.zeros([shape[i] if i == axis else 1 for i in range(len(shape))], bool)
    mask[(0,) * axis + (at,)] = True
    if update.array is not None:
        update = _known(np.expand_dims(update.array, axis))
    else:
        added = graph.add("Unsqueeze", update.name, graph.constant(axis))
        update = _Value((*update.shape[:axis], 1, *update.shape[axis:]), update.dtype, added)
    names = (graph.name(value) for value in (_known(mask), update, x))
    return _out(equation, graph.where(*names, x.dtype), _broadcast([_known(mask), update, x]))


_RULES: dict[str, Callable[..., Any]] = {
    "abs": _elementwise("Abs"),
    "add": _elementwise("Add"),
    "add_any": _elementwise("Add"),
    "and": _elementwise("And"),
    "argmax": _argmax,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _convert,
    "copy": _same_value,
    "div": _elementwise("Div"),
    "dot_general": _dot,
    "eq": _elementwise("Equal"),
    "erf": _elementwise("Erf"),
    "erfc": _erfc,
    "exp": _elementwise("Exp"),
    "gather": _gather,
    "ge": _elementwise("GreaterOrEqual"),
    "gt": _elementwise("Greater"),
    "iota": lambda graph, equation: _expect(False, equation),  # known, unless over the batch
    "le": _elementwise("LessOrEqual"),
    "logistic": _elementwise("Sigmoid"),
    "lt": _elementwise("Less"),
    "max": _elementwise("Max"),
    "min": _elementwise("Min"),
    "mul": _elementwise("Mul"),
    "ne": _elementwise("Equal", "Not"),
    "neg": _elementwise("Neg"),
    "not": _elementwise("Not"),
    "or": _elementwise("Or"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_sum": _reduce("ReduceSum"),
    "reshape": _reshape,
    "rsqrt": _elementwise("Sqrt", "Reciprocal"),
    "scatter": _scatter,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "sqrt": _elementwise("Sqrt"),
    "square": _square,
    "squeeze": _squeeze,
    "stack": _stack,
    "stop_gradient": _same_value,
    "sub": _elementwise("Sub"),
    "tanh": _elementwise("Tanh"),
    "top_k": _top_k,
    "transpose": _transpose,
}

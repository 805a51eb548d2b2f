"""How HQQ, GPTQ, AWQ, compressed-tensors and fine-grained float8 store the frozen weight of a linear layer.

Formats as in `formats.py`. These libraries have no operators in torch's registry: their functions are looked up where
the library has been imported, which it has wherever one of its modules is.

| format | library | tensors |
|---|---|---|
| `Hqq` | hqq | W_q, packed in groups; scale and zero of each group |
| `Gptq` | gptqmodel | qweight (I·bits/32, O), qzeros (G, O·bits/32), int32; scales (G, O); g_idx (I,), groups |
| `Awq` | gptqmodel | qweight (I, O·bits/32), qzeros (G, O·bits/32), int32; scales (G, O) |
| `Compressed` | compressed-tensors | what its compressor made of the weight, by the names in `names` |
| `BlockFloat8` | transformers | W8 (O, I) float8; a scale for each block; a scale of x, if that is quantised by one |

Shapes: T tokens, I in features, O out features, G groups of in features.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.kernels.formats import Format, Tensors

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Hqq(Format):
    """W = (W_q − zero) · scale in groups along the rows (axis 1) or the columns (axis 0) of W."""

    bits: float
    group: int | None
    axis: int
    packing: str | None
    """How the library packs; None: not at all."""
    view: torch.dtype | None
    """What W_q is to be looked at as, where it goes as numbers of another dtype."""

    @property
    def name(self) -> str:
        """Bits and group size."""
        group = "" if self.group is None else f", groups of {self.group}"
        return f"hqq {self.bits:g}-bit{group}"

    @property
    def cuts(self) -> bool:
        """Packed numbers lie far from their neighbours."""
        return False

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """By the library, in the module's compute dtype."""
        packed, scale, zero = tensors
        meta = {
            "compute_dtype": self.dtype,
            "packing": self.packing,
            "view_as_float": self.view is not None,
            "unpack_view_dtype": self.view,
            "nbits": self.bits,
            "group_size": self.group,
            "axis": self.axis,
            "shape": self.shape,
            "scale": scale,
            "zero": zero,
        }
        return _loaded("hqq.core.quantize").Quantizer.dequantize(packed, meta).to(dtype)


@dataclass(frozen=True, slots=True)
class Gptq(Format):
    """W[o, i] = scales[g, o] · (q − z), g = g_idx[i], in the dtype of the scales; q lies along the rows of W.

    The zeros are those of the format's second version, into which gptqmodel turns the first one (z − 1) for the kernels
    that are read here.
    """

    bits: int
    pack: int
    """Bits of the numbers that others are packed into."""

    @property
    def name(self) -> str:
        """Bits."""
        return f"gptq {self.bits}-bit"

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """That of x."""
        return dtype

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """On a GPU by the library's kernel."""
        qweight, qzeros, scales, g_idx = tensors
        if self._by_kernel(tensors):
            dequant = _loaded("gptqmodel.nn_modules.triton_utils.dequant").dequant
            most = 2**self.bits - 1
            w_IO = dequant(scales.dtype, qweight, scales, qzeros, g_idx, self.bits, self.pack, most)
            return _through(w_IO.T, self.dtype, dtype)
        return self._some(tensors, slice(None), dtype)

    def rows(self, tensors: Tensors, at: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Of those rows alone."""
        return self._some(tensors, at, dtype)

    def product(self, tensors: Tensors, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Dequantised; the bias is added to what was rounded, as the library does."""
        return _biased(F.linear(x_TI, self.dense(tensors, x_TI.dtype)), bias_O)

    def _by_kernel(self, tensors: Tensors) -> bool:
        qweight, _, _, g_idx = tensors
        return (
            qweight.device.type == "cuda"
            and g_idx.device == qweight.device
            and "gptqmodel.nn_modules.triton_utils.dequant" in sys.modules
            and not (self.shape[0] * self.bits) % self.pack
            and all(tensor.is_contiguous() for tensor in tensors)
        )

    def _some(self, tensors: Tensors, at: slice | Tensor, dtype: torch.dtype) -> Tensor:
        qweight, qzeros, scales, g_idx = tensors
        outputs, inputs = self.shape
        zeros = unpacked(qzeros.T, self.bits, self.pack, outputs).T[:, at]
        codes, group, scales = unpacked(qweight[:, at], self.bits, self.pack, inputs), g_idx.long(), scales[:, at]
        whole = codes.to(torch.int16).sub_(zeros.to(torch.int16)[group])
        return _through(whole.to(scales.dtype).mul_(scales[group]).T, self.dtype, dtype)


@dataclass(frozen=True, slots=True)
class Awq(Format):
    """W[o, i] = scales[g, o] · (q − z), g = i // group, in the dtype of the scales; q lies along the columns of W."""

    bits: int
    group: int
    half: bool
    """Whether products are in half precision, whatever x is."""

    @property
    def name(self) -> str:
        """Bits and group size."""
        return f"awq {self.bits}-bit, groups of {self.group}"

    @property
    def cuts(self) -> bool:
        """The library unpacks whole matrices."""
        return False

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """That of x, or a half one."""
        return dtype if dtype in _HALF or not self.half else torch.float16

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """By the library: on a GPU its kernel takes float16."""
        qweight, qzeros, scales = tensors
        if self.half:
            scales = scales.to(dtype if dtype in _HALF else self.dtype)
        kernel = sys.modules.get("gptqmodel.quantization.awq.modules.triton.gemm")
        if kernel is not None and qweight.is_cuda and self.bits == 4 and scales.dtype == torch.float16:
            w_IO = kernel.awq_dequantize_triton(qweight, scales, qzeros)
        else:
            unpack = _loaded("gptqmodel.quantization.awq.utils.packing_utils").dequantize_gemm
            w_IO = unpack(qweight, qzeros, scales, self.bits, self.group)
        return _through(w_IO.T, self.dtype, dtype)

    def product(self, tensors: Tensors, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Dequantised; the bias is added to what was rounded, as the library does."""
        dtype = self.computes_in(x_TI.dtype)
        return _biased(F.linear(x_TI.to(dtype), self.dense(tensors, dtype)), bias_O).to(x_TI.dtype)


@dataclass(frozen=True, slots=True)
class Compressed(Format):
    """What compressed-tensors makes of a weight by a scheme: packed whole numbers, int8, float8, and others.

    The library decompresses all weights of a model for good when it first runs. Here each is decompressed for a
    product, and stays as small as it is. Where the scheme quantises x, too, so do products.
    """

    names: tuple[str, ...]
    """Of the tensors, as on the module."""
    scheme: Any = field(hash=False)
    """The module's `quantization_scheme`."""
    kind: str
    """The scheme's format; "" where the library has decompressed the weight."""

    @property
    def name(self) -> str:
        """The scheme's format and bits."""
        return f"compressed-tensors {self.kind or 'decompressed'}, {self.scheme.weights.num_bits}-bit"

    @property
    def cuts(self) -> bool:
        """The library decompresses whole matrices."""
        return False

    @property
    def rounds_input(self) -> bool:
        """Where the scheme quantises x."""
        return self.scheme.input_activations is not None

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """That of x."""
        return dtype

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """By the library."""
        held: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        if not self.kind:
            return held["weight"].to(dtype)
        held["weight_shape"] = torch.Size(self.shape)  # (as a tensor on a GPU it would have to be waited for)
        compressor = _loaded("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(self.kind)
        return compressor.decompress(held, self.scheme)["weight"].to(dtype)

    def product(self, tensors: Tensors, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x as the library quantises it, times W."""
        if self.scheme.input_activations is not None:
            forward: Any = _loaded("compressed_tensors.quantization.lifecycle.forward")
            module = SimpleNamespace(
                quantization_status=_loaded("compressed_tensors.quantization").QuantizationStatus.FROZEN,
                **dict(zip(self.names, tensors, strict=True)),
            )
            # (Of two dimensions the library would take the tokens for one.)
            x = x_TI.reshape(1, -1, x_TI.shape[-1])
            x_TI = forward.forward_quantize(module, x, "input", self.scheme.input_activations).view_as(x_TI)
        bias = None if bias_O is None else bias_O.to(x_TI.dtype)
        return F.linear(x_TI, self.dense(tensors, x_TI.dtype), bias)


@dataclass(frozen=True, slots=True)
class BlockFloat8(Format):
    """W = scale ⊙ W8, with one scale for each block of W, or for all of it (transformers' fine-grained FP8).

    On a GPU products are its kernel's, which quantises x in blocks, where that kernel can be loaded; elsewhere W is
    dequantised.
    """

    block: tuple[int, int] | None
    """Rows and columns of W that share a scale; None: all of it."""
    deepgemm: bool
    """Whether the module may use DeepGEMM's kernels."""

    @property
    def name(self) -> str:
        """The blocks."""
        return "float8, one scale" if self.block is None else f"float8, blocks of {self.block[0]}×{self.block[1]}"

    @property
    def rounds_input(self) -> bool:
        """Where the kernel is at hand."""
        return kernel_for_float8()

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """That of x."""
        return dtype

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Rounded once, from float32, to the dtype of products."""
        return self.rows(tensors, slice(None), dtype)

    def rows(self, tensors: Tensors, at: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Of those rows alone."""
        w8, scale = tensors[:2]
        w = w8[at].to(dtype if dtype in _HALF else self.dtype)
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.float()
        if self.block is None:
            return w.mul_(scale).to(dtype)
        each, (outputs, inputs) = self.block, self.shape
        row = torch.arange(outputs, device=w8.device)[at] // each[0]
        whole = inputs // each[1] * each[1]
        scales = scale[row]  # (…, blocks along I)
        # In place and by views: no second matrix.
        w[:, :whole].unflatten(1, (-1, each[1])).mul_(scales[:, : whole // each[1], None])
        if whole < inputs:
            w[:, whole:].mul_(scales[:, -1:])
        return w.to(dtype)

    def product(self, tensors: Tensors, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """By the kernel, if x lies where it runs."""
        bias = None if bias_O is None else bias_O.to(x_TI.dtype)
        if x_TI.is_cuda and x_TI.dtype in _HALF and kernel_for_float8():
            linear = _loaded("transformers.integrations.finegrained_fp8").fp8_linear
            w8, scale, *of_x = tensors
            block = None if self.block is None else list(self.block)
            return linear(x_TI, w8, scale, block, bias, of_x[0] if of_x else None, self.deepgemm)
        return F.linear(x_TI, self.dense(tensors, x_TI.dtype), bias)


@cache
def kernel_for_float8() -> bool:
    """Whether transformers can load its kernel for products of float8 in blocks; asked once, as it may ask the hub."""
    if not torch.cuda.is_available():
        return False
    try:
        _loaded("transformers.integrations.finegrained_fp8").load_finegrained_fp8_kernel()
    except (ImportError, OSError, RuntimeError, ValueError):
        return False
    return True


def unpacked(packed_PN: Tensor, bits: int, pack: int, count: int) -> Tensor:
    """Whole numbers of `bits` bits, (count, N): they lie along the first dimension, the lowest bits first.

    Args:
        packed_PN: (⌈count · bits / pack⌉, N), of numbers of `pack` bits.
        bits: of each number; where `pack` is no multiple of it, numbers go across.
        pack: bits of each packed number.
        count: how many there are in a column.
    """
    most, device = 2**bits - 1, packed_PN.device
    if pack % bits == 0:
        shifts = torch.arange(0, pack, bits, dtype=packed_PN.dtype, device=device)
        codes = (packed_PN[:, None] >> shifts[:, None]).bitwise_and_(most)
        return codes.flatten(0, 1)[:count]
    first = torch.arange(count, device=device) * bits
    word, shift = first // pack, first % pack
    wide = packed_PN.long() & (2**pack - 1)
    following = wide[(word + 1).clamp_max(len(wide) - 1)] << pack
    return ((wide[word] | following) >> shift[:, None]) & most


def _through(w_OI: Tensor, first: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Rounded to the dtype of products before any wider one."""
    return w_OI.to(dtype if dtype in _HALF else first).to(dtype)


def _biased(z: Tensor, bias_O: Tensor | None) -> Tensor:
    return z if bias_O is None else z.add_(bias_O.to(z.dtype))


def _loaded(name: str) -> Any:
    """A module of a library's, which is there since one of its layers is."""
    if name not in sys.modules:
        raise ModuleNotFoundError(f"{name} is not imported, though a layer of its library is there")
    return sys.modules[name]

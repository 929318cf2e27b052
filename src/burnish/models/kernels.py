"""kernels.c on tensors: what a step does between its products, in one pass over memory each, on a CPU.

A norm written in torch goes over memory nine times, a gated activation six times, a block of logits seven times; on a CPU whose products are quick
that is half of a step. The C file is compiled once by the machine's own C compiler (a second) and kept in the user's cache, under a name that holds
its source, the compiler and the processor. Without a compiler everything works as before, by torch's own operations, and the training says so.

The functions run on the threads of torch's own OpenMP library: one pool, one setting of the number of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.models.embedded import cache_folder
from burnish.run import hash_file, write_whole

SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")
_COMPILE_SECONDS = 60
_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
# Of each function: p a tensor or None, f a float, l a whole number.
_SIGNATURES = {
    "rms_norm": "ppffppll",
    "rms_norm_back": "pppfppll",
    "norm_and_turn": "ppffpppplll",
    "norm_and_turn_back": "pppfpppplll",
    "gated": "lpppl",
    "gated_back": "lpppppl",
    "softmax": "pfpllllll",
    "softmax_back": "ppfpllllll",
    "join_logits": "ppppll",
    "logit_slopes": "pppppplll",
    "to_bytes": "pppll",
    "scale_rows": "pppll",
}  # fmt: skip
_ALLOCATING = {"norm_and_turn_back", "softmax", "softmax_back", "join_logits"}  # these may find no memory for a row of each thread
_C_TYPES = {"p": ctypes.c_void_p, "f": ctypes.c_float, "l": ctypes.c_long}


class NoKernels(Exception):
    """Why there are none here, in words for the user."""


class Kernels:
    """The functions of kernels.c. Tensors are contiguous, on the CPU, all of the float32 or bfloat16 of the first; `takes` asks."""

    def __init__(self, library: ctypes.CDLL, key: str) -> None:
        self.key = key  # of source, compiler and processor: with the same key, the same numbers
        self._functions = {}
        for name, letters in _SIGNATURES.items():
            for dtype, suffix in _TYPES.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes = [_C_TYPES[letter] for letter in letters]
                function.restype = ctypes.c_int if name in _ALLOCATING else None
                self._functions[name, dtype] = function

    def __deepcopy__(self, memo: Any) -> Kernels:
        return self

    def takes(self, *tensors: Tensor) -> bool:
        first = tensors[0].dtype
        return first in _TYPES and all(t.device.type == "cpu" and t.dtype == first and t.is_contiguous() for t in tensors)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> tuple[Tensor, Tensor]:
        """x (…, D), weight (D,) → normed (…, D), 1 ÷ root mean square (…,) float32."""
        y, scale = torch.empty_like(x), torch.empty(x.shape[:-1])
        self._call("rms_norm", x, weight, offset, epsilon, y, scale, scale.numel(), x.shape[-1])
        return y, scale

    def rms_norm_back(self, above: Tensor, x: Tensor, weight: Tensor, offset: float, scale: Tensor) -> Tensor:
        of_x = torch.empty_like(x)
        self._call("rms_norm_back", above, x, weight, offset, scale, of_x, scale.numel(), x.shape[-1])
        return of_x

    def norm_and_turn(
        self, x: Tensor, weight: Tensor | None, epsilon: float, offset: float, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Heads x (T, H, D), normed where there is a weight (D,), turned by cos and sin (T, D) → (T, H, D), 1 ÷ root mean square (T, H)."""
        y, scale = torch.empty_like(x), torch.empty(x.shape[:-1])
        self._call("norm_and_turn", x, weight, offset, epsilon, cos, sin, y, scale, *x.shape)
        return y, scale

    def norm_and_turn_back(
        self, above: Tensor, x: Tensor, weight: Tensor | None, offset: float, scale: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:  # fmt: skip
        of_x = torch.empty_like(x)
        self._call("norm_and_turn_back", above, x, weight, offset, scale, cos, sin, of_x, *x.shape)
        return of_x

    def gated(self, activation: str, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) · up, any shape; `activation` is one of ACTIVATIONS."""
        inner = torch.empty_like(gate)
        self._call("gated", gate, up, inner, gate.numel(), before=ACTIVATIONS[activation])
        return inner

    def gated_back(self, activation: str, gate: Tensor, up: Tensor, above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From d loss / d inner: inner again, d loss / d gate, d loss / d up; the last is written over `above`."""
        inner, of_gate = torch.empty_like(gate), torch.empty_like(gate)
        self._call("gated_back", gate, up, above, inner, of_gate, gate.numel(), before=ACTIVATIONS[activation])
        return inner, of_gate, above

    def softmax(self, scores: Tensor, scale: float, log_sums: Tensor, tokens: int, first: int, window: int | None) -> None:
        """Scores (K, tokens · G, S) become probabilities; token i sees keys first + i − window + 1 … first + i.

        log_sums: (K · tokens · G,), log Σ exp(scale · score) / scale.
        """
        batch, rows, keys = scores.shape
        self._call("softmax", scores, scale, log_sums, batch, tokens, rows // tokens, keys, first, window or keys)

    def softmax_back(
        self, scores: Tensor, above: Tensor, scale: float, log_sums: Tensor, tokens: int, first: int, window: int | None
    ) -> None:  # fmt: skip
        """Scores become probabilities again, d loss / d probability becomes d loss / d score."""
        batch, rows, keys = scores.shape
        self._call("softmax_back", scores, above, scale, log_sums, batch, tokens, rows // tokens, keys, first, window or keys)

    def join_logits(self, logits: Tensor, least: Tensor, log_sums: Tensor, bound: Tensor) -> None:
        """A block (N, words) joins each row's log Σ exp (N,) float32; bound (words,) gets an upper bound of each word's probability in any row,
        the tighter the higher `least` (N,) is: a logit of each row that is known beforehand."""
        self._call("join_logits", logits, least, log_sums, bound, *logits.shape)

    def logit_slopes(
        self, logits: Tensor, log_sums: Tensor, by_row: Tensor, share: Tensor, missing: Tensor, place: Tensor, start: int
    ) -> None:  # fmt: skip
        """Logits (N, words) become (p − [target]) · by_row; `missing` (N,) loses the probabilities. place: (N,) int64, targets at place − start;
        share: (N,) float32, the target's probability."""
        self._call("logit_slopes", logits, log_sums, by_row, share, missing, place, start, *logits.shape)

    def to_bytes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) → 128 + round(x ÷ scale) (T, D) uint8, scale (T,) = max |x| ÷ 127, NaN for a row that is not finite."""
        rounded, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0])
        self._call("to_bytes", x, rounded, scale, *x.shape)
        return rounded, scale

    def scale_rows(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """x (T, D) float32 · scale (T,) → (T, D) in `dtype`."""
        y = torch.empty(x.shape, dtype=dtype)
        self._functions["scale_rows", dtype](x.data_ptr(), scale.data_ptr(), y.data_ptr(), *x.shape)
        return y

    def _call(self, name: str, first: Tensor, *rest: Any, before: int | None = None) -> None:
        arguments = [_address(value) if isinstance(value, Tensor) else value for value in (first, *rest)]
        if self._functions[name, first.dtype](*([] if before is None else [before]), *arguments):
            raise MemoryError(f"kernel {name}: no memory for a row of each thread")


def _address(tensor: Tensor) -> int:
    """Raises where the numbers do not lie one after the other: the kernel would read others."""
    if not tensor.is_contiguous():
        raise ValueError(f"a kernel needs a contiguous tensor, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")
    return tensor.data_ptr()


@lru_cache(maxsize=1)
def find_kernels() -> Kernels:
    """The compiled kernels of this machine, compiled now if they never were. Raises NoKernels."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoKernels("no C compiler (cc, gcc or clang) is installed")
    flags = (*_FLAGS, "-mprefer-vector-width=512") if "avx512f" in _processor() else _FLAGS
    parts = (SOURCE.read_text(encoding="utf-8"), " ".join(flags), _version(compiler), _processor(), platform.machine())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = cache_folder() / f"kernels-{os.getuid()}"  # each user's own: a cache may be shared
    file = folder / f"kernels-{key}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (state := folder.stat()).st_uid != os.getuid() or state.st_mode & 0o022:
            raise NoKernels(f"somebody else may write into {folder}, and could put another library there: chmod 700 it, or remove it")
        if not _is_whole(file):
            _compile(compiler, flags, file)
        return _checked(_load(file, key))
    except (OSError, AttributeError, subprocess.SubprocessError) as problem:
        raise NoKernels(f"{compiler} or what it made does not work here: {str(problem)[:300]}") from problem


def _compile(compiler: str, flags: tuple[str, ...], file: Path) -> None:
    """Kept with its SHA-256 beside it. Not linked with an OpenMP library: torch's own is used (`_load`)."""
    with tempfile.TemporaryDirectory(dir=file.parent) as aside:
        made = Path(aside) / "kernels.o"
        for command in (
            [compiler, *flags, "-c", str(SOURCE), "-o", str(made)],
            [compiler, "-shared", str(made), "-o", str(made.with_suffix(".so")), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
            if done.returncode:
                raise NoKernels(f"{compiler} cannot compile them: {done.stderr.strip()[-300:]}")
        library = made.with_suffix(".so").read_bytes()
    write_whole(file, library)
    write_whole(file.with_suffix(".sha256"), hashlib.sha256(library).hexdigest().encode())


def _is_whole(file: Path) -> bool:
    """Whether the library is as it was compiled: one that a crash cut short would end the process that loads it."""
    kept = file.with_suffix(".sha256")
    return file.exists() and kept.exists() and hash_file(file) == kept.read_text(encoding="ascii", errors="replace")


def _load(file: Path, key: str) -> Kernels:
    for name in _openmp():
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return Kernels(ctypes.CDLL(str(file)), key)


def _openmp() -> list[str]:
    """The OpenMP library that torch has loaded."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*", mapped)))[:1]


def _checked(kernels: Kernels) -> Kernels:
    """One function against torch, so that a compiler's fault does not come into a training. The modules that use the others prove their way onward
    (fused.py); the ways back are compared in the tests only."""
    x = torch.linspace(-30, 30, 4096).view(4, 1024)
    found = torch.full((4,), -torch.inf)
    kernels.join_logits(x, x[:, 0].contiguous(), found, torch.empty(1024))
    if not torch.allclose(found, torch.logsumexp(x, 1), rtol=1e-5):
        raise NoKernels("what the compiler made does not compute what torch does")
    return kernels


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_COMPILE_SECONDS).stdout


@cache
def _processor() -> str:
    """The processor's name and what it can do, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))

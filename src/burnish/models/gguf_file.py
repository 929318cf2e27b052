"""Whether the weights that transformers read from a .gguf file are those that the file holds.

transformers draws a tensor it does not find at random, with no more than a warning, and puts rows back into their own order by the
architecture's name. So on every load each linear layer and the embedding are looked up in the file once more, by gguf's own table of names, and some
rows, de-quantised by gguf, are compared. (That gguf's and transformers' decoders agree on each type is shown in tests/contract/test_quantizers.py.)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import ModelError
from burnish.models.layers import linear_names

ROWS = 16  # compared of each tensor
# Tensors that llama.cpp's converter reorders in ways that are not followed here: by architecture, parts of their names.
REORDERED = {"bloom": ("attn_qkv",), "qwen35": ("attn_qkv", "attn_gate", "ssm_"), "qwen35moe": ("attn_qkv", "attn_gate", "ssm_")}


def prove_file(model: Any, file: Path) -> None:
    """Raises ModelError where a weight of the model is not in the file, or is another there."""
    reader = _reader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    wrong, compared = [], 0
    for path, name in _names(model, architecture).items():
        if any(part in name for part in REORDERED.get(architecture, ())):
            continue
        tensor, module = stored.get(name), model.get_submodule(path)
        if tensor is None:
            wrong.append(f"{path}: there is no tensor {name}")
        elif len(tensor.shape) == 2:
            matrix = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            error = _error(matrix, tensor, _row_order(model.config.get_text_config(), architecture, name, len(tensor.data)))
            compared += 1
            if not error <= (1e-4 if matrix.dtype == torch.float32 else 2e-2):  # transformers computes some types in the model's own
                wrong.append(f"{path}: {error:.1e} away from {name} ({tensor.tensor_type.name})")
    if wrong or not compared:
        found = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ModelError(
            f"{file}: read through transformers, the model is not what the file holds: {found or f'no tensor of {architecture} is known by name'}. "
            "Take the model's safetensors, or a file from another converter"
        )


def _error(matrix: Tensor, tensor: Any, order: Tensor) -> float:
    """How far `ROWS` rows are from the file's, relative to their size; 1 where the shapes differ."""
    import gguf

    if list(matrix.shape) != [len(order), int(tensor.shape[0])]:
        return 1.0
    rows = torch.linspace(0, len(order) - 1, min(ROWS, len(order))).long()
    expected = torch.tensor(gguf.quants.dequantize(tensor.data[order[rows].numpy()], tensor.tensor_type))
    return float((matrix[rows.to(matrix.device)].float().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))


def _row_order(config: Any, architecture: str, name: str, rows: int) -> Tensor:
    """Which row of the file is row 0, 1, 2 … of the model: another only in the queries and keys of Llama and its kin, where llama.cpp holds
    the two halves of a head by turns (`LlamaModel.permute` of its convert_hf_to_gguf.py)."""
    order, part = torch.arange(rows), name.split(".")[-2]
    if architecture != "llama" or part not in ("attn_q", "attn_k"):
        return order
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    return order.reshape(heads, -1, 2).transpose(1, 2).reshape(-1)


def _names(model: Any, architecture: str) -> dict[str, str]:
    """Module → its tensor's name in the file, for each linear layer, the embedding and a head of its own; left out where gguf knows none."""
    import gguf

    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        return {}
    table = gguf.get_tensor_name_map(kind, model.config.get_text_config().num_hidden_layers)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(embedding)} | ({id(head)} if head is not None and head.weight is not embedding.weight else set())
    paths = [*linear_names(model), *(path for path, module in model.named_modules() if id(module) in ends)]
    # Some families are known to gguf without their outermost name.
    known = {path: table.get_name(path) or table.get_name(path.partition(".")[2]) for path in paths}
    return {path: f"{name}.weight" for path, name in known.items() if name}


def _reader(file: Path) -> Any:
    """gguf's reader, passing over lists: it looked at 262,144 words, their scores and kinds one by one, which took 9.5 s."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            item, count = gguf.GGUFValueType(self._get(orig_offs, "uint32")[0]), int(self._get(orig_offs + 4, "uint64")[0])
            view, offset = memoryview(self.data), orig_offs + 12
            if item == gguf.GGUFValueType.STRING:
                for _ in range(count):
                    offset += 8 + int.from_bytes(view[offset : offset + 8], sys.byteorder)
            elif item in self.gguf_scalar_to_np:
                offset += count * self._get(offset, self.gguf_scalar_to_np[item], 1).itemsize
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            return offset - orig_offs, [], [], [gguf.GGUFValueType(raw_type)]

    return Reader(file)

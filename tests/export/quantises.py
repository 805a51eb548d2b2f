"""Stands in for llama-quantize where llama.cpp is not: matrices in Q5_0, as llama.cpp itself takes for narrow rows.

example:
  python quantises.py SOURCE.gguf TARGET.gguf Q4_K_M
"""

import sys

import gguf

FILE_TYPES = {"Q4_K_M": 15, "Q6_K": 18, "Q4_0": 2}


def main(source: str, target: str, kind: str) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = FILE_TYPES[kind] if name == "general.file_type" else field.contents()
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=sub_type)
    stored = gguf.GGMLQuantizationType.Q5_0
    for tensor in reader.tensors:
        if len(tensor.shape) == 2 and tensor.shape[0] % 32 == 0:
            writer.add_tensor(tensor.name, gguf.quantize(tensor.data, stored), raw_dtype=stored)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compiles one CUDA C file to PTX with NVRTC, which needs no GPU: ptx.py LIBRARY SOURCE OPTION... > PTX. See ptx.mjs."""

import ctypes
import sys

library, source, *options = sys.argv[1:]
nvrtc = ctypes.CDLL(library)
program = ctypes.c_void_p()


def read(size, get):
    length = ctypes.c_size_t()
    size(program, ctypes.byref(length))
    text = ctypes.create_string_buffer(length.value)
    get(program, text)
    return text.value


with open(source, "rb") as file:
    code = file.read()
if nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, source.encode(), 0, None, None) != 0:
    sys.exit("NVRTC made no program.")
arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
if nvrtc.nvrtcCompileProgram(program, len(options), arguments) != 0:
    sys.exit(read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode())
sys.stdout.buffer.write(read(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX))

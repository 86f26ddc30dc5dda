"""What instances of the kernels are called in machine code.

CuPy before 14.2 keeps no module on disk that was asked for by `name_expressions`. A source that makes an
instance itself needs none, if its name in machine code is known: by the Itanium C++ ABI, which NVRTC follows.
"""

from __future__ import annotations

import re
import string

from cupy_syncbn.backends.cuda.kernels import ACTIVATIONS, INVERTED

PARAMETERS = {
    "statistics": "PKT_xxxxxxxxPdS3_dddddS3_Pj",
    "normalize": "PKT_PS1_S3_PhxxxxxxxxPKdS7_PKvS9_PvSA_PxxdxdN13AccumulatorOfIS1_E4typeEPdPjSF_",
    "reduce_gradients": "PKT_S3_PS1_PKhxxxxxxxxPKdN13AccumulatorOfIS1_E4typeEPdSC_dddddSC_Pj",
    "input_gradient": "PKT_S3_PS1_PKhxxxxxxxxPKdN13AccumulatorOfIS1_E4typeES8_S8_dPvSC_xPd",
}
"""The kernels' parameters for data of a built-in type; tests compare them with NVRTC's."""
CENTERED_SQUARES = "_Z16centered_squaresPKdS0_dxPddddddS1_"

_BUILT_IN = {"float": "f", "double": "d"}
_DIGITS = string.digits + string.ascii_uppercase


def instantiation(name: str) -> str:
    """Return the line of C++ that makes an instance of a template."""
    return f"template __global__ decltype({name}) {name};\n" if "<" in name else ""


def symbol(name: str) -> str:
    """Return the name in machine code of an instance, such as ``statistics<float, 4, true>``."""
    kernel, _, rest = name.rstrip(">").partition("<")
    if not rest:
        return CENTERED_SQUARES
    data_type, width, *others = rest.split(", ")
    built_in = _BUILT_IN.get(data_type)
    parts = [built_in or f"{len(data_type)}{data_type}", f"Li{width}E"]
    for other in others:
        if other in ("true", "false"):
            parts.append(f"Lb{int(other == 'true')}E")
        else:
            parts.append(f"L10Activation{(*ACTIVATIONS, INVERTED).index(other)}E")
    parameters = PARAMETERS[kernel]
    if not built_in:  # the type's own name counts among what is referred to by numbers, in base 36
        parameters = re.sub(r"S(\w)_", lambda found: f"S{_DIGITS[_DIGITS.index(found[1]) + 1]}_", parameters)
    return f"_Z{len(kernel)}{kernel}I{''.join(parts)}Ev{parameters}"

"""Rewrites what g++ cannot read in a kernel's text, and keeps every line where it is.

* ``__shared__ T name[n];`` becomes a reference to memory of the block, with exact bounds. One declarator a
  statement; the size may depend on template parameters; ``extern __shared__`` is the dynamic shared memory.
* ``__launch_bounds__(n)`` becomes a check at the beginning of the kernel's body.
"""

import re

_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)

_SHARED = re.compile(
    r"""
    (?P<extern>extern\s+)? __shared__ \s+
    (?: (?:__align__|alignas) \s* \( (?P<alignment>[^)]*) \) \s* )?
    (?P<type>[^;=]*? [\s>&*])
    (?P<name>[A-Za-z_]\w*) \s*
    (?P<sizes>(?: \[ [^\]]* \] \s*)*) ;
    """,
    re.VERBOSE,
)

_LAUNCH_BOUNDS = re.compile(r"__launch_bounds__\s*\(")
_EXTERN_C_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\('
)


def rewrite(source):
    """Return the text of a .cu file for g++ with cuda_on_cpu.h."""
    return _rewrite_launch_bounds(_SHARED.sub(_rewrite_shared, _without_comments(source)))


def extern_c_kernels(source):
    """Return the names of the kernels declared extern "C", in their order."""
    return _EXTERN_C_KERNEL.findall(_without_comments(source))


def _without_comments(source):
    """Blank comments out, so that a word in them is not taken for a declaration."""

    def blank(match):
        text = match[0]
        return text if text.startswith('"') else re.sub(r"[^\n]", " ", text)

    return _STRING_OR_COMMENT.sub(blank, source)


def _rewrite_shared(match):
    name, element, sizes = match["name"], match["type"].strip(), match["sizes"].strip()
    newlines = "\n" * match[0].count("\n")
    if "," in re.sub(r"<.*>", "", element):
        raise ValueError(f"the emulator takes one declarator a statement (got {match[0]!r})")
    if match["extern"]:
        return f"{element}* {name} = static_cast<{element}*>(emu_dynamic_shared());{newlines}"
    alignment = f"alignas({match['alignment']}) " if match["alignment"] else ""
    # The address of a static tells the declarations apart: each instance of a template has its own static.
    return (
        f"static const char emu_key_{name} = 0; "
        f"typedef {alignment}{element} emu_type_{name}{sizes}; "
        f'emu_type_{name}& {name} = emu::shared<emu_type_{name}>(&emu_key_{name}, "{name}");{newlines}'
    )


def _rewrite_launch_bounds(source):
    """Move the bounds of each kernel into its body; a declaration without a body just loses them."""
    pieces, position = [], 0
    while match := _LAUNCH_BOUNDS.search(source, position):
        bounds_end = _closing(source, match.end() - 1)
        bounds = source[match.end() : bounds_end]
        parameters_end = _closing(source, source.index("(", bounds_end))
        body = re.compile(r"\s*\{").match(source, parameters_end + 1)
        pieces += [source[position : match.start()], "\n" * bounds.count("\n")]
        position = bounds_end + 1
        if body:
            pieces += [source[position : body.end()], f" emu::launch_bounds({' '.join(bounds.split())});"]
            position = body.end()
    return "".join([*pieces, source[position:]])


def _closing(source, opening):
    """Return the position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for position in range(opening, len(source)):
        depth += {"(": 1, ")": -1}.get(source[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"a parenthesis is not closed: {source[opening : opening + 60]!r}")

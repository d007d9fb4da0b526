"""What to do where the compiled modules can't be imported: not built, built for another Python, or broken."""

import os
from importlib.machinery import EXTENSION_SUFFIXES


def explained(error, folder):
    """An ImportError that says so, of the one that came while cbn, in `folder`, was imported; that itself where the cause is another."""
    if not (error.name or "").startswith("cbn") and not (error.path or "").startswith(folder):
        return error        # of NumPy, or an environment variable that is wrong
    is_source = os.path.exists(os.path.join(folder, "dispatch.pyx"))
    remedy = "build it (pip install -e .)" if is_source else "install it anew (pip install --force-reinstall --no-cache-dir cbn)"
    elsewhere = ", or start Python in another folder to use a cbn that is installed" if is_source else ""
    built = sorted(name for name in os.listdir(folder) if name.startswith("dispatch.") and name.endswith((".so", ".pyd")))
    if not built:
        found = "is a checkout that was not built" if is_source else "lacks its compiled modules"
    elif not any(name == "dispatch" + suffix for name in built for suffix in EXTENSION_SUFFIXES):
        found = f"was built for another Python: it has {', '.join(built)}, where this one looks for dispatch{EXTENSION_SUFFIXES[0]}"
    else:
        found = f"has a compiled module that can't be loaded ({error})"
    return ImportError(f"cbn: {folder} {found}; {remedy}{elsewhere}")

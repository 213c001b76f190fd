"""Bundles signed in the format of OpenSSF Model Signing 1.0, beside the signature of our own inside them.

The library ``model-signing`` writes it: an in-toto statement with the file's SHA-256, signed by ECDSA in a DSSE
envelope, in a Sigstore bundle. Devices do not read it; it is for a policy that asks for this format on the way there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_file
from resvit_engines.outside import read_outside

_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def load_openssf_signer(key: Path) -> Callable[[Path], Path]:
    """Take the private EC key in a PEM file; returns what signs a bundle and writes ``BUNDLE.sig`` anew.

    Raises:
        ResvitError: MISSING without the library; INPUT for a key that is none of P-256, P-384 or P-521 or has a
            password, and for files that cannot be read.
    """
    try:
        from model_signing import signing
    except ImportError as error:
        raise ResvitError(
            f"The library that signs as OpenSSF Model Signing says is not here ({error}).",
            "Install it with: pip install 'resvit-export[openssf]'",
            ExitCode.MISSING,
        ) from error
    _require_key(key)
    config = signing.Config().use_elliptic_key_signer(private_key=key)

    def sign(bundle: Path) -> Path:
        out = bundle.with_name(f"{bundle.name}.sig")
        with atomic_file(out) as partial:
            config.sign(bundle.resolve(), partial)
        return out

    return sign


def _require_key(path: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    fix = "Make one with: openssl ecparam -genkey -name prime256v1 -noout -out openssf.pem"
    try:
        key = load_pem_private_key(read_outside(path), None)
    except TypeError as error:
        raise ResvitError(
            f"The key {path} has a password.", "Take it off, or sign with model_signing itself."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ResvitError(f"{path} holds no private key in PEM that can be read.", fix) from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise ResvitError(f"{path} is no key that OpenSSF Model Signing takes: EC on P-256, P-384 or P-521.", fix)

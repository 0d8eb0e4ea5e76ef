"""Whose certificates are believed: those that the system trusts, whatever the environment says.

`SSL_CERT_FILE` and `SSL_CERT_DIR` could name others, which is why the context is not made by
`ssl.create_default_context`.

Deliberately absent: certificates of our own.
"""

import ssl
import sys
from functools import cache
from pathlib import Path

__all__ = ["system_trust"]

# Where systems have their certificates, if not where OpenSSL was told to look when it was compiled (Go, crypto/x509).
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


@cache
def system_trust() -> ssl.SSLContext:
    """What verifies a provider's certificate.

    One for all: reading the certificates takes 35 ms, for each of a dozen providers at every start.
    """
    if sys.platform == "darwin":
        import truststore  # noqa: PLC0415  # asks the keychain; needed nowhere else

        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    compiled = ssl.get_default_verify_paths()
    bundle = next((place for place in (compiled.openssl_cafile, *_BUNDLES) if Path(place).is_file()), None)
    directory = compiled.openssl_capath if Path(compiled.openssl_capath).is_dir() else None
    if bundle or directory:
        context.load_verify_locations(bundle, directory)
    return context

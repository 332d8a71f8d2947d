"""What of a configuration is safe to try and not to leave so: said on the page as long as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dicom_node.configuration.config import is_loopback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dicom_node.configuration.config import Config


def find(config: Config) -> Iterator[str]:
    """Each in a sentence, with its remedy."""
    node, page = config.node, config.page
    if not (is_loopback(node.address) or node.allowed_calling_aes or node.allowed_addresses or node.tls):
        yield "Anyone on the network may send images to this node: name the scanners in node.allowed_calling_aes."
    if not is_loopback(page.address):
        if page.users is None:
            yield "Anyone on the network may see this page and acknowledge alerts: set page.users."
        if not page.tls:
            yield "This page goes over the network unencrypted, names and passwords too: set page.tls."

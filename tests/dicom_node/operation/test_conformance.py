"""The conformance statement in docs is what the code goes by."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from dicom_node.delivery import confirmation
from dicom_node.intake import commitment, mpps, receiver
from dicom_node.network import services
from dicom_node.operation.conformance import compose

STATEMENT = Path(__file__).parents[3] / "docs" / "conformance.md"


def test_the_statement_in_docs_is_the_one_that_the_code_makes():
    assert STATEMENT.read_text() == compose(), "run `scanside conformance > docs/conformance.md`"


@pytest.mark.parametrize("confirm", ["commitment", "query"])
def test_destinations_are_asked_in_the_transfer_syntaxes_that_the_statement_names(confirm):
    (context,) = confirmation.Confirmation(None, confirm, lambda: False).contexts()
    names = ", ".join(syntax.name for syntax in context.transfer_syntax)
    assert f"| {context.abstract_syntax} | SCU | {names} |" in compose()


@pytest.mark.parametrize(
    "module", [receiver, mpps, commitment, confirmation, services], ids=lambda module: module.__name__
)
def test_every_status_that_is_answered_has_its_reason(module):
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
    answered = [call.args[0].id for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Answer"]
    assert len(answered) > 1
    assert {getattr(module, name) for name in answered} == set(module.STATUSES)

"""docs/methods.md and ``finetune methods``: every method is told, and every refusal has its reason."""

import pytest
from click.testing import CliRunner, Result

from finetune_api import method_pages
from finetune_api.compatibility import COMPATIBILITY
from finetune_api.guide import GUIDES
from finetune_api.method_pages import cells, facts, footnotes, lines, memory, parameters, refused
from finetune_api.schema import METHOD_PARAMETERS
from finetune_operator.cli.main import main


def finetune(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.mark.parametrize("name", COMPATIBILITY)
def test_a_method_is_told_as_the_table_and_the_tests_have_it(name: str) -> None:
    row, seen = COMPATIBILITY[name], facts()["methods"][name]
    assert set(GUIDES[name].why) == set(refused(row)), "a reason for every refusal and for nothing else"
    assert seen["zero"] == list(row.zero_stages)
    assert (seen["packing"], seen["gradient_checkpointing"]) == (row.packing, row.gradient_checkpointing)
    assert (seen["merge"], seen["quantized"], seen["processes"]) == (row.merge, row.quantized, 2)
    assert seen["loss"][1] < seen["loss"][0]
    assert all(lines(name).values())
    assert tuple(key for key, *_ in parameters(name)) == METHOD_PARAMETERS[name]


def test_the_page_is_whole() -> None:
    page = method_pages.rendered()
    for name in COMPATIBILITY:
        assert f"\n## {name}\n" in page and f"| [{name}](#{name}) |" in page
    for reason, number in footnotes().items():
        assert f"[{number}] {reason}" in page


def test_memory_is_what_is_known_of_an_8b_model() -> None:
    weights = facts()["methods"]["full"]["8b"]["total"]
    assert memory("full", weights, weights) == pytest.approx(16 * 8.03e9 / 2**30, rel=1e-3)
    trained = facts()["methods"]["lora"]["8b"]["trained"]
    assert trained == 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert memory("lora", trained, weights + trained) == pytest.approx((2 * weights + 16 * trained) / 2**30)
    assert memory("qlora", trained, weights + trained) < 7


def test_every_cell_of_the_table_is_printed() -> None:
    said = finetune("methods").output
    for name in COMPATIBILITY:
        line = next(line for line in said.splitlines() if line.startswith(f"{name} "))
        assert all(cell in line for cell in cells(name, footnotes()))
    assert all(f"[{number}] {reason}" in said for reason, number in footnotes().items())


def test_a_method_is_explained() -> None:
    said = finetune("methods", "lora").output
    assert "What:   LoRA: a low-rank update" in said and "arXiv:2106.09685" in said
    assert "  r (a whole number from 1 to 4096; default 16)\n      Rank of the update.\n" in said
    assert "It has no parameters." in finetune("methods", "full").output


def test_an_unknown_method_is_answered_with_those_there_are() -> None:
    wrong = finetune("methods", "lorra")
    assert wrong.exit_code == 2
    assert "accepted: full, freeze" in wrong.output and "Do you mean lora?" in wrong.output

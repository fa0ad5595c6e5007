from fedhead.server.report.layout import Section
from fedhead.server.report.releases import MOST_LISTS, releases
from fedhead.server.runs.record import JournalRecord, RunRecord, SiteRecord


def section(*lists: tuple[str, ...]) -> Section:
    sites = {f"site-{number}": SiteRecord(standing="ready", steps=steps) for number, steps in enumerate(lists)}
    return releases(RunRecord(name="run", config={}, toml="", journal=JournalRecord(simulated=False, sites=sites)))


def test_the_report_lists_the_steps_that_real_sites_described() -> None:
    guarded, noisy = ("The guard withholds.", "A ledger."), ("<b>Noise</b> is added.",)
    text = section(guarded, noisy, guarded, ()).sentences[0]
    assert text == (
        "Release steps, as the sites described them. 2 sites: The guard withholds. A ledger. "
        "1 site: <b>Noise</b> is added."
    )


def test_many_different_lists_of_steps_are_counted() -> None:
    text = section(*((f"Step {number}.",) for number in range(MOST_LISTS + 3))).sentences[0]
    assert text.count("Step ") == MOST_LISTS
    assert text.endswith("3 more sites described other steps.")


def test_sites_that_describe_no_steps_have_a_guard() -> None:
    assert section((), ()).sentences[0].startswith("Release steps: each site's own guard")

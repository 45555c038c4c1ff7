"""The head of a report as a picture: report_picture.py runs/demo/report.html docs/report.png."""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1100)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    given = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(
            viewport={"width": given.width, "height": given.height}, color_scheme=given.scheme
        )
        page.goto(given.report.resolve().as_uri())
        page.screenshot(path=given.picture)
        chromium.close()


if __name__ == "__main__":
    main()

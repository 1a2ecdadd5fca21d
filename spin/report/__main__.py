"""python -m spin.report: see page.py."""

from spin.report.page import main

if __name__ == "__main__":
    main()

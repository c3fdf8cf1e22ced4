"`python -m dmp_wb` is the `dmp-wb` command."
from dmp_wb.cli import main

if __name__ == "__main__": main()

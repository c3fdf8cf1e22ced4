"""Everything about the package stands in settings.ini;
this file hands it to setuptools, and puts the run notebooks and experiments into what is built."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


class BuildWithNotebooks(build_py):
    """Copies nbs/runs and nbs/experiments into the package that is built, where `core.shipped_folder` finds them;
    an editable install reads them where they are."""
    def copied(self) -> dict[Path, Path]:
        files = [f for pattern in ("runs/*.ipynb", "experiments/*.yaml") for f in sorted((here / "nbs").glob(pattern))]
        if not files:
            raise FileNotFoundError(
                f"no run notebooks in {here / 'nbs'}: expected the whole source tree, or an sdist of it")
        return {} if self.editable_mode else {f: Path(self.build_lib, "dmp_wb", f.relative_to(here)) for f in files}

    def run(self):
        super().run()
        for source, target in self.copied().items():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *map(str, self.copied().values())]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    packages=find_packages(include=["dmp_wb", "dmp_wb.*"]),
    package_data={"dmp_wb": ["assets/**/*", "py.typed"]},
    cmdclass={"build_py": BuildWithNotebooks},
    include_package_data=False,
    entry_points={"console_scripts": ["dmp-wb = dmp_wb.cli:main"],
                  "papermill.engine": ["dmp-wb = dmp_wb.batch.engine:RunEngine"]},
    zip_safe=False,
)

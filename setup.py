"""Everything about the package stands in settings.ini; this file only hands it to setuptools.

`data/` and `nbs/` travel inside the wheel as `faithful_distill/shipped/...`, so that an installed package can do all a checkout can.
"""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
c = config["DEFAULT"]
lib = c["lib_name"]
shipped = {f"{lib}.shipped.data": "data", f"{lib}.shipped.nbs": "nbs"}
status = {
    "1": "1 - Planning",
    "2": "2 - Pre-Alpha",
    "3": "3 - Alpha",
    "4": "4 - Beta",
    "5": "5 - Production/Stable",
}[c["status"]]

address = f"{c['git_url']}/{{}}/{c['branch']}/"  # links of the README must lead somewhere from the package index too
readme = Path("README.md").read_text(encoding="utf-8")
readme = re.sub(r"(!\[[^]]*\]\()(?!\w+:|#)", rf"\1{address.format('raw')}", readme)
readme = re.sub(r"(?<!!)(\[[^]]*\]\()(?!\w+:|#|!)", rf"\1{address.format('blob')}", readme)

setup(
    name=lib,
    version=c["version"],
    description=c["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=c["author"],
    author_email=c["author_email"],
    url=c["git_url"],
    keywords=c["keywords"],
    license_expression=c["license"],
    python_requires=f">={c['min_python']}",
    classifiers=[
        f"Development Status :: {status}",
        f"Intended Audience :: {c['audience']}",
        f"Natural Language :: {c['language']}",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    packages=find_packages(include=[lib, f"{lib}.*"]) + list(shipped),
    package_dir=shipped,
    include_package_data=False,  # package_data says it all; else setuptools takes each data folder for a package, and warns
    package_data={
        "": ["py.typed", "*.pyi"],
        f"{lib}.shipped.data": [
            "README.md",
            "world/*",
            "prompts/*",
            "rationales/*",
            "grids/*",
            "deepspeed/*",
            "report/*",
            "models/*/*",
            "results/*",
            "report/*",
        ],
        f"{lib}.shipped.nbs": ["*.ipynb", "experiments/*.ipynb", "figures/*.ipynb"],
    },
    install_requires=c["requirements"].split(),
    extras_require={
        "gguf": c["gguf_requirements"].split(),
        "served": c["served_requirements"].split(),
        "docs": ["myst-nb", "furo", "sphinx-copybutton", "latex2mathml"],
        "dev": c["dev_requirements"].split(),
        "lora": ["peft"],
    },
    entry_points={"console_scripts": c["console_scripts"].split()},
)

"""`python -m selfalign.cli`, which launchers use."""

import sys

from selfalign.cli import main

sys.exit(main())

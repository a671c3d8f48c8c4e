// Nothing of it is used. See README.md.
#pragma once

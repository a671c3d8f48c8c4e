// Empty: libtorch's header includes this file, but uses nothing from it. See README.md.
#pragma once

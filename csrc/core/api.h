// SPDX-License-Identifier: Apache-2.0
#pragma once

// What libfullbeam.so exports; all else in it is hidden.
#define FULLBEAM_API __attribute__((visibility("default")))

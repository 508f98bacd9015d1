# SPDX-License-Identifier: Apache-2.0
"""What is sent and received: `components`, `operations`, `errors`."""

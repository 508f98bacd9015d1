// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "ops/attention_prefill.h"

namespace fullbeam {

// The same with one query per sequence, at its last position: row i of q belongs to sequence i.
struct AttentionDecodeParams : AttentionPrefillParams {};

FULLBEAM_DECLARE_OP(attention_decode, AttentionDecodeParams)

}  // namespace fullbeam

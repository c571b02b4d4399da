// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Deprecated: the names that public functions had. The next version does not have them.
 */

#define tcplat_find tcplat_lookup
#define tcplat_meet tcplat_lookup_or_create
#define tcplat_touch tcplat_claim
#define tcplat_use tcplat_claim_role

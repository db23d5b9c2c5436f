// SPDX-License-Identifier: GPL-2.0-only
/*
 * The memory of an attached queue: the control page and the two areas, each in
 * one piece, because the device names it by guest-physical addresses.
 */
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "ringpass_blk.h"

static void rp_pages_free(void *pages, size_t bytes)
{
	if (pages)
		free_pages_exact(pages, bytes);
}

void rp_memory_free(struct rp_memory *memory)
{
	unsigned int i;

	if (!memory)
		return;
	for (i = 0; i < 2; i++) {
		rp_pages_free(memory->areas[i].rings, memory->rings_bytes);
		rp_pages_free(memory->areas[i].sqes, memory->sqes_bytes);
	}
	rp_pages_free(memory->control, memory->control_bytes);
	kvfree(memory->tickets);
	kvfree(memory->free_tickets);
	kfree(memory);
}

/* An allocation of this many bytes is aligned to the page of the device. */
static void *rp_pages_alloc(size_t bytes)
{
	return alloc_pages_exact(bytes, GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN);
}

struct rp_memory *rp_memory_alloc(struct rp_device *dev)
{
	struct ringpass_attach_payload *payload;
	struct rp_memory *memory;
	unsigned int i;

	memory = kzalloc(sizeof(*memory), GFP_KERNEL);
	if (!memory)
		return NULL;
	memory->sq_entries = dev->sq_entries;
	memory->cq_entries = dev->cq_entries;
	memory->control_bytes = ALIGN(RINGPASS_CONTROL_PAGE_BYTES, dev->page_bytes);
	memory->rings_bytes = ALIGN(RINGPASS_RINGS_HEADER_BYTES +
				    RINGPASS_CQE_BYTES * memory->cq_entries,
				    dev->page_bytes);
	memory->sqes_bytes = ALIGN(RINGPASS_SQE_BYTES * memory->sq_entries,
				   dev->page_bytes);
	memory->control = rp_pages_alloc(memory->control_bytes);
	memory->tickets = kvcalloc(memory->cq_entries, sizeof(*memory->tickets),
				   GFP_KERNEL);
	memory->free_tickets = kvcalloc(memory->cq_entries, sizeof(u32),
					GFP_KERNEL);
	if (!memory->control || !memory->tickets || !memory->free_tickets)
		goto fail;
	for (i = 0; i < memory->cq_entries; i++)
		memory->free_tickets[i] = i;

	payload = &memory->attach.payload;
	payload->version = cpu_to_le16(RINGPASS_VERSION);
	payload->features = cpu_to_le64(RINGPASS_F_DSYNC);
	payload->sq_entries = cpu_to_le32(memory->sq_entries);
	payload->cq_entries = cpu_to_le32(memory->cq_entries);
	payload->control_gpa = cpu_to_le64(virt_to_phys(memory->control));
	for (i = 0; i < 2; i++) {
		memory->areas[i].rings = rp_pages_alloc(memory->rings_bytes);
		memory->areas[i].sqes = rp_pages_alloc(memory->sqes_bytes);
		if (!memory->areas[i].rings || !memory->areas[i].sqes)
			goto fail;
		payload->areas[i].rings_gpa =
			cpu_to_le64(virt_to_phys(memory->areas[i].rings));
		payload->areas[i].sqes_gpa =
			cpu_to_le64(virt_to_phys(memory->areas[i].sqes));
	}
	return memory;

fail:
	rp_memory_free(memory);
	return NULL;
}

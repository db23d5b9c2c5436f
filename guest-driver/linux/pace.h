/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef RINGPASS_PACE_H
#define RINGPASS_PACE_H

#include <linux/jiffies.h>
#include <linux/types.h>

/*
 * Limits how often something is done. A device that works stays far below; a
 * device that sends the driver round in circles costs no more than this.
 */
struct rp_pace {
	unsigned long start;
	unsigned int count;
};

/* Counts one more, and returns 0; or returns the jiffies until there may be one. */
static inline unsigned long rp_pace_wait(struct rp_pace *pace, unsigned int most,
					 unsigned long period)
{
	unsigned long passed = jiffies - pace->start;

	if (!pace->count || passed >= period) {
		pace->start = jiffies;
		pace->count = 0;
	}
	if (pace->count >= most)
		return period - passed;
	pace->count++;
	return 0;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM ringpass_blk

#if !defined(RINGPASS_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define RINGPASS_TRACE_H

#include <linux/tracepoint.h>

#define rp_show_state(state)				\
	__print_symbolic(state,				\
		{ 0, "detached" },			\
		{ 1, "emptying" },			\
		{ 2, "idle" },				\
		{ 3, "running" },			\
		{ 4, "draining" },			\
		{ 5, "failed" })

/* A queue enters another state. */
TRACE_EVENT(ringpass_state,
	TP_PROTO(int disk, unsigned int queue, int from, int to, u32 epoch,
		 u32 word),
	TP_ARGS(disk, queue, from, to, epoch, word),
	TP_STRUCT__entry(
		__field(int, disk)
		__field(unsigned int, queue)
		__field(int, from)
		__field(int, to)
		__field(u32, epoch)
		__field(u32, word)
	),
	TP_fast_assign(
		__entry->disk = disk;
		__entry->queue = queue;
		__entry->from = from;
		__entry->to = to;
		__entry->epoch = epoch;
		__entry->word = word;
	),
	TP_printk("disk=%d queue=%u %s -> %s epoch=%u word=%#x",
		  __entry->disk, __entry->queue, rp_show_state(__entry->from),
		  rp_show_state(__entry->to), __entry->epoch, __entry->word)
);

/* A command of the ringpass interface has been answered. */
TRACE_EVENT(ringpass_answer,
	TP_PROTO(int disk, unsigned int queue, u32 type, u8 status, u32 value),
	TP_ARGS(disk, queue, type, status, value),
	TP_STRUCT__entry(
		__field(int, disk)
		__field(unsigned int, queue)
		__field(u32, type)
		__field(u8, status)
		__field(u32, value)
	),
	TP_fast_assign(
		__entry->disk = disk;
		__entry->queue = queue;
		__entry->type = type;
		__entry->status = status;
		__entry->value = value;
	),
	TP_printk("disk=%d queue=%u type=%#x status=%u value=%#x",
		  __entry->disk, __entry->queue, __entry->type, __entry->status,
		  __entry->value)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE ringpass_trace
#include <trace/define_trace.h>

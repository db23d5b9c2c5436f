/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A virtio-blk driver that runs the queues of a ringpass device on io_uring
 * rings of the host. docs/abi.md of ringpass specifies the interface; the
 * section numbers in the comments are those of that document.
 */
#ifndef RINGPASS_BLK_H
#define RINGPASS_BLK_H

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/kobject.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/scatterlist.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_blk.h>
#include <linux/workqueue.h>
#include <uapi/linux/io_uring.h>

#include "compat.h"
#include "pace.h"
#include "ringpass_abi.h"

#ifdef CONFIG_ARCH_NO_SG_CHAIN
#define RP_INLINE_SG	0
#else
#define RP_INLINE_SG	2
#endif

/*
 * A request with more physically separate pieces than this goes over a
 * virtqueue. An SQE costs the host more than a descriptor does: from about
 * this many on, a virtqueue is quicker (benches/benches/fragmented.rs), and one
 * such request would take the room of this many others.
 */
#define RP_REQUEST_SQES_MAX	32

/* The device has not written the status of a command yet. */
#define RP_STATUS_NONE		0xff

struct rp_device;

/*
 * What stands in the virtqueues: requests of the block layer and commands of
 * the ringpass interface. Both begin with this.
 */
struct rp_token {
	bool is_command;
};

/* The driver's part of a request of the block layer. */
struct rp_request {
	struct rp_token token;
	u8 status;
	/* A ring has refused the request: it goes over a virtqueue. */
	bool no_ring;
	/* A CQE has said that the request must be sent again. */
	bool again;
	/* The first error that a CQE has reported, or the final result. */
	blk_status_t result;
	/* SQEs without CQE. */
	unsigned int sqes;
	/* The next request of a struct rp_done. */
	struct rp_request *next;
	struct virtio_blk_outhdr header;
	struct sg_table sg_table;
	struct scatterlist sg[];
};

/* A request of the ringpass interface, section 2. */
struct rp_command {
	struct rp_token token;
	u8 status;
	struct virtio_blk_outhdr header;
	struct ringpass_attach_payload payload;
	union {
		struct ringpass_probe_answer probe;
		struct ringpass_outcome outcome;
		struct ringpass_event_answer event;
	} answer;
};

/*
 * Requests that have left a queue while its lock was held. They are completed
 * or sent again when the lock has been released.
 */
struct rp_done {
	struct rp_request *first;
	struct rp_request **last;
	/* The queue has room again for those that it had turned away. */
	bool restart;
	/* The device must look at the control page. */
	bool doorbell;
	/* The device's worker has something to do. */
	bool work;
};

/* An SQE that the driver has put into a ring and that has no CQE yet. */
struct rp_ticket {
	struct request *rq;
	u32 len;
	/* Tells this use of the ticket from earlier ones. */
	u32 serial;
};

/* The memory of an attached queue that the device knows, section 4. */
struct rp_memory {
	struct list_head node;
	u32 sq_entries;
	u32 cq_entries;
	size_t control_bytes;
	size_t rings_bytes;
	size_t sqes_bytes;
	struct ringpass_control_page *control;
	struct {
		void *rings;
		struct io_uring_sqe *sqes;
	} areas[2];
	struct rp_command arm;
	struct rp_command attach;
	/* Not known to the device: the SQEs that are outstanding. */
	struct rp_ticket *tickets;
	u32 *free_tickets;
};

/* The ring of the open epoch, from a checked copy of its record. */
struct rp_ring {
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
	u32 *sq_head;
	u32 *sq_tail;
	u32 *sq_flags;
	u32 *cq_head;
	u32 *cq_tail;
	u32 *cq_flags;
	/* The driver's own indexes: it never reads those in the ring back. */
	u32 tail;
	u32 published;
	u32 head;
	u32 sq_mask;
	u32 cq_mask;
	u32 doorbell;
	u32 mode;
	u32 slot_shift;
	u64 iova_base;
	u64 gpa_limit;
	u32 address_mask;
	u32 length_mask;
	u32 segment_bytes_max;
};

/*
 * The driver's states of section 6. Reaping and Leaving are not among them:
 * the driver passes through both while it holds the queue's lock.
 */
enum rp_state {
	/* Detached: the virtqueue is an ordinary one. */
	RP_DETACHED,
	/* The queue is to be attached when its virtqueue is empty. */
	RP_EMPTYING,
	/* ATTACH is pending, and there is no ring. */
	RP_IDLE,
	RP_RUNNING,
	RP_DRAINING,
	/* The device has broken a rule. */
	RP_FAILED,
};

/* When a driver that has no ring may ask for one. */
enum rp_retry {
	RP_RETRY_NOW,
	RP_RETRY_LATER,
	RP_RETRY_EVENT,
	RP_RETRY_PROBE,
	RP_RETRY_NEVER,
};

struct rp_stats {
	u64 ring_requests;
	u64 ring_sqes;
	u64 durable_writes;
	u64 virtqueue_requests;
	u64 fallbacks;
	u64 doorbells;
	u64 interrupts;
};

/*
 * One queue of the device: a virtqueue, and a ring while the queue is
 * attached.
 */
struct rp_queue {
	struct rp_device *dev;
	struct virtqueue *vq;
	unsigned int index;
	/* No interrupts: blk-mq polls. */
	bool polled;
	/* The queue whose ring the requests of this one use, or NULL. */
	struct rp_queue *ring_queue;
	char name[24];

	/* Protects the virtqueue, the ring, and everything below. */
	spinlock_t lock;
	enum rp_state state;
	/* Block requests in the virtqueue. */
	unsigned int in_flight;
	/* A hardware queue is stopped because there was no room here. */
	bool starved;

	struct rp_ring ring;
	struct rp_memory *memory;
	u32 free_count;
	u32 serial;
	u32 epoch;
	/* The device has announced something since ATTACH. */
	bool announced;
	u32 acknowledged;
	/* The used index before ARM. */
	u16 used_before;

	/* For the next ATTACH: not before this time, whatever @retry says. */
	enum rp_retry retry;
	u32 refusal;
	unsigned long retry_at;
	unsigned long retry_delay;
	unsigned int events_before;
	struct rp_pace attach_pace;
	/* What the log has said last. */
	bool logged_ring;
	bool logged_refusal;
	struct rp_pace log_pace;

	struct rp_stats stats;
	/* Memory of before the last reset, until the queue has answered. */
	struct list_head quarantine;
	bool answered;
	struct kobject *kobj;
} ____cacheline_aligned_in_smp;

/* Bits of rp_device.flags */
enum {
	RP_PROBE_ANSWERED,
	RP_EVENT_ANSWERED,
	RP_PROBE_PENDING,
	RP_EVENT_PENDING,
	/* The device understands the ringpass interface. */
	RP_FAST,
	/* The device has broken a rule and must be reset. */
	RP_BROKEN,
	/* The device was reset for good: every request fails. */
	RP_DEAD,
	/* No queue may be attached: reset, removal, suspend, shutdown. */
	RP_STOPPING,
	/* There are no virtqueues: suspended, or not back from that. */
	RP_SUSPENDED,
};

struct rp_device {
	/* Protects @vdev against removal, for those that may come later. */
	struct mutex vdev_mutex;
	struct virtio_device *vdev;
	struct gendisk *disk;
	struct blk_mq_tag_set tag_set;
	struct work_struct config_work;
	/* In the list of reboot.c. */
	struct list_head node;
	int index;

	unsigned int num_queues;
	/* The queue of the first hardware queue: 0, or 1 (see rp_find_vqs). */
	unsigned int first_queue;
	unsigned int hw_queues[HCTX_MAX_TYPES];
	struct rp_queue *queues;

	unsigned long flags;
	/* Held while the mode of the write cache changes. */
	struct mutex cache_mutex;
	/* Writes on rings are durable: the write cache is off. */
	bool dsync;
	/* Everything that takes time: PROBE, EVENT, ATTACH, a broken device. */
	struct delayed_work work;
	struct rp_pace work_pace;
	struct rp_command *probe;
	struct rp_command *event;
	unsigned int events;
	/* When a device that has refused EVENT is asked again; 0: it has not. */
	unsigned long event_delay;
	unsigned long event_at;
	/* The answer of PROBE. */
	u32 sq_entries;
	u32 cq_entries;
	u32 page_bytes;
	unsigned int queue_count;
	struct kobject *kobj;
};

extern struct workqueue_struct *rp_workqueue;
extern bool rp_fastpath;

static inline struct request *rp_rq(struct rp_request *req)
{
	return blk_mq_rq_from_pdu(req);
}

static inline bool rp_is_attached(const struct rp_queue *q)
{
	return q->memory && q->state >= RP_IDLE;
}

/* The bytes that the device knows. */
static inline size_t rp_memory_bytes(const struct rp_memory *memory)
{
	return memory->control_bytes +
	       2 * (memory->rings_bytes + memory->sqes_bytes);
}

static inline void rp_done_init(struct rp_done *done)
{
	*done = (struct rp_done) { .last = &done->first };
}

static inline void rp_done_add(struct rp_done *done, struct rp_request *req)
{
	req->next = NULL;
	*done->last = req;
	done->last = &req->next;
}

/* device.c: probe, removal, suspend, shutdown */
void rp_device_free(struct rp_device *dev);

/* queues.c: the virtqueues of a device */
int rp_count_queues(struct rp_device *dev);
void rp_init_queues(struct rp_device *dev);
int rp_find_vqs(struct rp_device *dev);
unsigned int rp_least_descriptors(struct rp_device *dev);

/* blk.c: the interface to blk-mq */
extern const struct blk_mq_ops rp_mq_ops;
void rp_finish(struct rp_queue *q, struct rp_done *done);
void rp_service(struct rp_queue *q);

/* config.c: the configuration space */
extern const struct attribute_group *rp_disk_groups[];
extern const struct block_device_operations rp_fops;
int rp_read_limits(struct virtio_device *vdev, struct queue_limits *lim);
bool rp_cache_is_on(struct virtio_device *vdev);
int rp_restore_cache(struct rp_device *dev);
void rp_update_capacity(struct rp_device *dev, bool resize);
void rp_config_changed(struct virtio_device *vdev);
void rp_config_work(struct work_struct *work);

/* virtqueue.c: requests and commands in virtqueues */
blk_status_t rp_prepare(struct rp_device *dev, struct request *rq);
blk_status_t rp_virtqueue_add(struct rp_queue *q, struct request *rq);
void rp_release(struct request *rq);
int rp_command_add(struct rp_queue *q, struct rp_command *cmd, u32 type,
		   size_t payload_bytes, size_t answer_bytes);
void rp_virtqueue_reap(struct rp_queue *q, struct rp_done *done);
void rp_callback(struct virtqueue *vq);

/* ring.c: the ring of the open epoch */
enum rp_pushed {
	RP_PUSHED,
	RP_NO_ROOM,
	RP_UNFIT,
};

enum rp_pushed rp_ring_push(struct rp_queue *q, struct request *rq);
bool rp_ring_publish(struct rp_queue *q);
int rp_ring_reap(struct rp_queue *q, struct rp_done *done);
int rp_ring_drain(struct rp_queue *q, struct rp_done *done);
void rp_ring_put_aside(struct rp_queue *q, struct rp_done *done, blk_status_t status);
int rp_ring_start(struct rp_queue *q, u32 epoch);

/* epoch.c: the state machine */
void rp_enter(struct rp_queue *q, enum rp_state state, u32 word);
void rp_epoch_step(struct rp_queue *q, struct rp_done *done);

/* probe.c: PROBE and EVENT, and the worker of the device */
const char *rp_why_no_rings(struct virtio_device *vdev);
void rp_probe_send(struct rp_device *dev);
unsigned long rp_event_wait(const struct rp_device *dev);
void rp_command_done(struct rp_device *dev, struct rp_command *cmd,
		     struct rp_done *done);
void rp_work(struct work_struct *work);

/* attach.c: ARM and ATTACH */
enum rp_retry rp_retry_of(u32 error);
void rp_attach_completed(struct rp_queue *q, struct rp_done *done);
void rp_attach_queues(struct rp_device *dev);
void rp_log_queue(struct rp_queue *q);

/* memory.c: the memory that the device knows */
struct rp_memory *rp_memory_alloc(struct rp_device *dev);
void rp_memory_free(struct rp_memory *memory);

/* reset.c: detaching, quarantine, and the end of a broken device */
unsigned long rp_detach_limit(void);
void rp_stop_rings(struct rp_device *dev);
void rp_stop_rings_of_all(struct list_head *devices);
void rp_quarantine(struct rp_device *dev);
void rp_quarantine_end(struct rp_queue *q);
void rp_quarantine_keep(struct rp_device *dev);
void rp_bury(struct rp_device *dev);

/* reboot.c: all devices, before a reboot or kexec */
extern struct notifier_block rp_reboot_notifier;
void rp_reboot_add(struct rp_device *dev);
void rp_reboot_remove(struct rp_device *dev);
void rp_allow_rings(struct rp_device *dev);

/* sysfs.c: statistics of each queue */
int rp_sysfs_add(struct rp_device *dev);
void rp_sysfs_remove(struct rp_device *dev);

#endif

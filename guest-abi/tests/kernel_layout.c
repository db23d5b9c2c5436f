// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// What <linux/io_uring.h> says, for kernel_layout.rs to compare with:
//   kernel_layout facts             one line per fact: its name and its numbers
//   kernel_layout sqe VALUE...      the bytes of an SQE whose fields have these values, in hex
//   kernel_layout cqe VALUE...      the bytes of a CQE, likewise
//
// Nothing here depends on the version of the header: fields that Linux 6.14 gave a second name (attr_ptr,
// attr_type_mask) go by the first one, and a missing name is an error of the compiler.

#include <linux/fs.h>
#include <linux/io_uring.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FIELD(type, rust_name, c_name)                                                                    \
	printf("%s.%s %zu %zu\n", #type, #rust_name, offsetof(struct io_uring_##type, c_name),            \
	       sizeof(((struct io_uring_##type *)0)->c_name))

#define VALUE(name) printf("%s %lld\n", #name, (long long)(name))

static void print_facts(void)
{
	FIELD(sqe, opcode, opcode);
	FIELD(sqe, flags, flags);
	FIELD(sqe, ioprio, ioprio);
	FIELD(sqe, fd, fd);
	FIELD(sqe, off_bytes, off);
	FIELD(sqe, addr, addr);
	FIELD(sqe, len_bytes, len);
	FIELD(sqe, rw_flags, rw_flags);
	FIELD(sqe, user_data, user_data);
	FIELD(sqe, buf_index, buf_index);
	FIELD(sqe, personality, personality);
	FIELD(sqe, file_index, file_index);
	FIELD(sqe, addr3, addr3);
	FIELD(sqe, pad2, __pad2);
	printf("sqe %zu %zu\n", sizeof(struct io_uring_sqe), _Alignof(struct io_uring_sqe));

	FIELD(cqe, user_data, user_data);
	FIELD(cqe, res, res);
	FIELD(cqe, flags, flags);
	printf("cqe %zu %zu\n", sizeof(struct io_uring_cqe), _Alignof(struct io_uring_cqe));

	VALUE(IORING_OP_READ_FIXED);
	VALUE(IORING_OP_WRITE_FIXED);
	VALUE(IOSQE_FIXED_FILE);
	VALUE(IORING_SQ_NEED_WAKEUP);
	VALUE(IORING_SQ_CQ_OVERFLOW);
	VALUE(IORING_CQ_EVENTFD_DISABLED);
	VALUE(RWF_DSYNC);
}

static void print_bytes(const void *entry, size_t size)
{
	const unsigned char *bytes = entry;

	for (size_t i = 0; i < size; i++)
		printf("%02x", bytes[i]);
	printf("\n");
}

// The next value, cut to the field it is assigned to.
#define NEXT() strtoull(*values++, NULL, 10)

static void print_sqe(char **values)
{
	struct io_uring_sqe sqe;

	memset(&sqe, 0, sizeof(sqe));
	sqe.opcode = NEXT();
	sqe.flags = NEXT();
	sqe.ioprio = NEXT();
	sqe.fd = NEXT();
	sqe.off = NEXT();
	sqe.addr = NEXT();
	sqe.len = NEXT();
	sqe.rw_flags = NEXT();
	sqe.user_data = NEXT();
	sqe.buf_index = NEXT();
	sqe.personality = NEXT();
	sqe.file_index = NEXT();
	sqe.addr3 = NEXT();
	sqe.__pad2[0] = NEXT();
	print_bytes(&sqe, sizeof(sqe));
}

static void print_cqe(char **values)
{
	struct io_uring_cqe cqe;

	memset(&cqe, 0, sizeof(cqe));
	cqe.user_data = NEXT();
	cqe.res = NEXT();
	cqe.flags = NEXT();
	print_bytes(&cqe, sizeof(cqe));
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "facts"))
		print_facts();
	else if (argc == 2 + 14 && !strcmp(argv[1], "sqe"))
		print_sqe(argv + 2);
	else if (argc == 2 + 3 && !strcmp(argv[1], "cqe"))
		print_cqe(argv + 2);
	else
		return 2;
	return 0;
}

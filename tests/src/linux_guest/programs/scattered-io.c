/*
 * scattered-io DISK OFFSET_BYTES LENGTH_BYTES ROUNDS SEED
 *
 * Each round writes 512 bytes to 4 MiB with direct I/O to a random place of this
 * part of the disk, and reads them back. The memory of both is many pieces in
 * random order, each a multiple of 512 bytes at such an offset into a page, or
 * now and then one long piece. Every byte is compared, also those beside the
 * pieces that are read, which must stay as they are. In between the program
 * sends what the kernel must refuse.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define BLOCK 512
#define PAGE 4096
#define REQUEST_MAX (4 << 20)
/* Each piece has pages of its own, and one before them. */
#define POOL ((size_t)3 * REQUEST_MAX + (size_t)IOV_MAX * 2 * PAGE)
#define UNTOUCHED 0xee

static uint64_t state;

static uint64_t random_number(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (state >> 11) % below;
}

/* Bytes that tell their place on the disk and the round. */
static unsigned char pattern(uint64_t place, uint64_t round)
{
	uint64_t block = place / BLOCK + round * 0x9e3779b97f4a7c15;

	return (block * 0xff51afd7ed558ccd >> 56) ^ place * 7;
}

/*
 * Cuts LENGTH bytes into pieces of at most MOST bytes, in random order. USED is
 * the end of the last piece.
 */
static int cut(unsigned char *pool, struct iovec *pieces, size_t length, size_t most,
	       size_t *used)
{
	size_t at = 0, rest = length;
	int count = 0, i;

	while (rest) {
		size_t bytes = BLOCK * (1 + random_number(most / BLOCK));
		/* The last possible piece takes the rest. */
		if (bytes > rest || count == IOV_MAX - 1)
			bytes = rest;
		at += BLOCK * random_number(PAGE / BLOCK);
		pieces[count].iov_base = pool + at;
		pieces[count++].iov_len = bytes;
		at = (at + bytes + 2 * PAGE - 1) / PAGE * PAGE;
		rest -= bytes;
	}
	if (at > POOL)
		errx(1, "the pool is too small");
	*used = at;
	for (i = count - 1; i > 0; i--) {
		int other = random_number(i + 1);
		struct iovec piece = pieces[i];

		pieces[i] = pieces[other];
		pieces[other] = piece;
	}
	return count;
}

static void whole(ssize_t done, size_t length, const char *what)
{
	if (done < 0)
		err(1, "%s of %zu bytes", what, length);
	if ((size_t)done != length)
		errx(1, "%s of %zu bytes: %zd", what, length, done);
}

static void fill(struct iovec *pieces, int count, uint64_t place, uint64_t round)
{
	for (int i = 0; i < count; i++)
		for (size_t at = 0; at < pieces[i].iov_len; at++)
			((unsigned char *)pieces[i].iov_base)[at] = pattern(place++, round);
}

static void compare(unsigned char *pool, size_t used, struct iovec *pieces, int count,
		    uint64_t place, uint64_t round)
{
	for (int i = 0; i < count; i++)
		for (size_t at = 0; at < pieces[i].iov_len; at++, place++) {
			unsigned char *byte = (unsigned char *)pieces[i].iov_base + at;

			if (*byte != pattern(place, round))
				errx(1, "byte %llu of the disk is %#x and was written as %#x (round %llu)",
				     (unsigned long long)place, *byte, pattern(place, round),
				     (unsigned long long)round);
			*byte = UNTOUCHED;
		}
	for (size_t at = 0; at < used; at++)
		if (pool[at] != UNTOUCHED)
			errx(1, "byte %zu beside the pieces was written: %#x (round %llu)", at,
			     pool[at], (unsigned long long)round);
}

static void refused(ssize_t done, const char *what)
{
	if (done >= 0 || errno != EINVAL)
		errx(1, "%s: %zd, %s", what, done, strerror(errno));
}

/* None of these is a multiple of a block. */
static void refusals(int fd, unsigned char *pool, uint64_t offset)
{
	struct iovec pieces[2] = { { pool, BLOCK }, { pool + PAGE, BLOCK - 1 } };

	refused(pwrite(fd, pool, BLOCK, offset + 100), "a write at an odd place");
	refused(pread(fd, pool, BLOCK, offset + 1), "a read at an odd place");
	refused(pwrite(fd, pool, BLOCK + 1, offset), "a write of an odd length");
	refused(pread(fd, pool, BLOCK - 1, offset), "a read of an odd length");
	refused(pread(fd, pool + 1, BLOCK, offset), "a read to an odd address");
	refused(pwrite(fd, pool + 3, PAGE, offset), "a write from an odd address");
	refused(preadv(fd, pieces, 2, offset), "a read with an odd piece");
}

int main(int argc, char **argv)
{
	static struct iovec pieces[IOV_MAX];
	/* The pieces of most requests are so few that they fit a ring. */
	static const size_t mosts[] = { PAGE, 2 * PAGE, 8 * PAGE, 32 * PAGE, REQUEST_MAX };
	unsigned long long offset, length, rounds, pieces_in_all = 0;
	unsigned char *pool;
	int fd;

	if (argc != 6)
		errx(1, "scattered-io DISK OFFSET_BYTES LENGTH_BYTES ROUNDS SEED");
	fd = open(argv[1], O_RDWR | O_DIRECT);
	if (fd < 0)
		err(1, "%s", argv[1]);
	offset = strtoull(argv[2], NULL, 0);
	length = strtoull(argv[3], NULL, 0);
	rounds = strtoull(argv[4], NULL, 0);
	state = strtoull(argv[5], NULL, 0) | 1;
	pool = mmap(NULL, POOL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pool == MAP_FAILED)
		err(1, "mmap");
	/* Pages of their own, as far apart in memory as it comes. */
	madvise(pool, POOL, MADV_NOHUGEPAGE);
	memset(pool, UNTOUCHED, POOL);

	refusals(fd, pool, offset);
	for (unsigned long long round = 1; round <= rounds; round++) {
		size_t most = mosts[random_number(sizeof(mosts) / sizeof(mosts[0]))];
		size_t limit = random_number(4) ? 16 * most : REQUEST_MAX;
		size_t bytes, place, used;
		int count;

		if (limit > REQUEST_MAX)
			limit = REQUEST_MAX;
		bytes = BLOCK * (1 + random_number(limit / BLOCK));
		place = offset + BLOCK * random_number((length - bytes) / BLOCK + 1);
		count = cut(pool, pieces, bytes, most, &used);
		pieces_in_all += count;
		fill(pieces, count, place, round);
		whole(pwritev2(fd, pieces, count, place, round % 3 ? 0 : RWF_DSYNC), bytes, "a write");
		memset(pool, UNTOUCHED, used);
		count = cut(pool, pieces, bytes, most, &used);
		pieces_in_all += count;
		whole(preadv(fd, pieces, count, place), bytes, "a read");
		compare(pool, used, pieces, count, place, round);
	}
	refusals(fd, pool, offset);
	printf("%llu rounds, %llu pieces\n", rounds, pieces_in_all);
	return 0;
}

// SPDX-License-Identifier: MIT
/*
 * uring sqp|wrk PORT: connect to this port of 127.0.0.1, send one byte and read one, by io_uring.
 *
 * A thread that the kernel adds to the process does each: the one that polls the queue
 * (iou-sqp-PID), or a worker (iou-wrk-PID). It ends at the latest when the other end closes.
 *
 * By system calls: the tests do not install liburing.
 */
#include <arpa/inet.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct io_uring_params params;
static char *submissions, *completions;
static struct io_uring_sqe *entries;
static int ring;

static char *map(size_t size, off_t what)
{
	char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, what);

	if (at == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	return at;
}

/* Do one request; its result. There is no other meanwhile: entry 0 of the queue is free. */
static int request(int opcode, int fd, void *data, uint32_t len, uint64_t off)
{
	uint32_t *tail = (uint32_t *)(submissions + params.sq_off.tail);
	uint32_t *flags = (uint32_t *)(submissions + params.sq_off.flags);
	uint32_t *array = (uint32_t *)(submissions + params.sq_off.array);
	uint32_t *head = (uint32_t *)(completions + params.cq_off.head);
	uint32_t *done = (uint32_t *)(completions + params.cq_off.tail);
	struct io_uring_cqe *results = (struct io_uring_cqe *)(completions + params.cq_off.cqes);
	int polled = params.flags & IORING_SETUP_SQPOLL, how = IORING_ENTER_GETEVENTS, result;

	memset(entries, 0, sizeof(*entries));
	entries->opcode = opcode;
	entries->fd = fd;
	entries->addr = (uintptr_t)data;
	entries->len = len;
	entries->off = off;
	entries->flags = polled ? 0 : IOSQE_ASYNC;
	array[*tail & (params.sq_entries - 1)] = 0;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_SEQ_CST);
	if (polled && __atomic_load_n(flags, __ATOMIC_SEQ_CST) & IORING_SQ_NEED_WAKEUP)
		how |= IORING_ENTER_SQ_WAKEUP;
	while (__atomic_load_n(done, __ATOMIC_ACQUIRE) == *head) {
		if (syscall(__NR_io_uring_enter, ring, 1, 1, how, NULL, 0) < 0) {
			perror("io_uring_enter");
			exit(1);
		}
	}
	result = results[*head & (params.cq_entries - 1)].res;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return result;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}};
	int fd = socket(AF_INET, SOCK_STREAM, 0), connected, sent, received;
	struct pollfd readable = {fd, POLLIN, 0};
	char byte = 'x';

	if (argc != 3)
		return 2;
	to.sin_port = htons(atoi(argv[2]));
	if (!strcmp(argv[1], "sqp"))
		params.flags = IORING_SETUP_SQPOLL;
	ring = syscall(__NR_io_uring_setup, 1, &params);
	if (ring < 0) {
		perror("io_uring_setup");
		return 1;
	}
	submissions =
		map(params.sq_off.array + params.sq_entries * sizeof(uint32_t), IORING_OFF_SQ_RING);
	completions = map(params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe),
			  IORING_OFF_CQ_RING);
	entries = (void *)map(params.sq_entries * sizeof(*entries), IORING_OFF_SQES);

	connected = request(IORING_OP_CONNECT, fd, &to, 0, sizeof(to));
	sent = request(IORING_OP_SEND, fd, &byte, 1, 0);
	/* A worker that finds nothing to read leaves the request to the thread that made it. */
	poll(&readable, 1, -1);
	received = request(IORING_OP_RECV, fd, &byte, 1, 0);
	if (connected || sent != 1 || received != 1) {
		fprintf(stderr, "connect %d, send %d, recv %d\n", connected, sent, received);
		return 1;
	}
	return 0;
}

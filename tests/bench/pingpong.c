// SPDX-License-Identifier: MIT
/*
 * pingpong SECONDS CONNECTIONS: requests of 100 bytes and answers of 1,000 over loopback,
 * one in flight per connection, each with a thread of its own on either side.
 *
 * Prints how many requests were answered and the time of each, in ns: p50 and p99.
 * The first line is the client's process id, printed before it waits for a line on
 * standard input, so that a tracer can be attached to it.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ASKED 100
#define ANSWERED 1000
#define KEPT 4000000 /* times kept per connection: the oldest are overwritten */
#define WARM_UP_US 200000

static int port;
static volatile int measuring, stopping;

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int take(int fd, char *to, int count)
{
	int have = 0, got;

	while (have < count) {
		got = recv(fd, to + have, count - have, 0);
		if (got <= 0)
			return 0;
		have += got;
	}
	return 1;
}

static void *serve(void *arg)
{
	int fd = (long)arg, one = 1;
	char data[ANSWERED] = {};

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	while (take(fd, data, ASKED) && send(fd, data, ANSWERED, MSG_NOSIGNAL) == ANSWERED)
		;
	close(fd);
	return NULL;
}

struct caller {
	pthread_t thread;
	uint64_t count;
	uint32_t *times;
};

static void *call(void *arg)
{
	struct sockaddr_in to = {AF_INET, htons(port), {htonl(INADDR_LOOPBACK)}};
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	struct caller *me = arg;
	char data[ANSWERED] = {};
	uint64_t began, ended;

	if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
		exit(1);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	began = now_ns();
	while (!stopping) {
		if (send(fd, data, ASKED, 0) != ASKED || !take(fd, data, ANSWERED))
			exit(1);
		ended = now_ns();
		if (measuring)
			me->times[me->count++ % KEPT] = ended - began;
		began = ended;
	}
	close(fd);
	return NULL;
}

static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	struct sockaddr_in here = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}};
	int listening = socket(AF_INET, SOCK_STREAM, 0), connections, i;
	socklen_t length = sizeof(here);
	uint64_t total = 0, began, took;
	struct caller *callers;
	double seconds;
	uint32_t *all;
	char line[2];
	pid_t server;

	if (argc != 3 || bind(listening, (struct sockaddr *)&here, length) ||
	    listen(listening, 128))
		return 2;
	seconds = atof(argv[1]);
	connections = atoi(argv[2]);
	getsockname(listening, (struct sockaddr *)&here, &length);
	port = ntohs(here.sin_port);
	server = fork();
	if (!server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		prctl(PR_SET_NAME, "server");
		for (;;) {
			pthread_t thread;
			long fd = accept(listening, NULL, NULL);

			pthread_create(&thread, NULL, serve, (void *)fd);
			pthread_detach(thread);
		}
	}
	printf("%d\n", getpid());
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 2;
	callers = calloc(connections, sizeof(*callers));
	for (i = 0; i < connections; i++) {
		callers[i].times = malloc(KEPT * sizeof(uint32_t));
		pthread_create(&callers[i].thread, NULL, call, &callers[i]);
	}
	/* What was started beside us has cost caches, and the machine its pace. */
	usleep(WARM_UP_US);
	began = now_ns();
	measuring = 1;
	usleep(seconds * 1e6);
	stopping = 1;
	for (i = 0; i < connections; i++)
		pthread_join(callers[i].thread, NULL);
	took = now_ns() - began;
	for (i = 0; i < connections; i++)
		total += callers[i].count < KEPT ? callers[i].count : KEPT;
	all = malloc(total * sizeof(*all));
	total = 0;
	for (i = 0; i < connections; i++) {
		uint64_t kept = callers[i].count < KEPT ? callers[i].count : KEPT;

		memcpy(all + total, callers[i].times, kept * sizeof(*all));
		total += kept;
	}
	qsort(all, total, sizeof(*all), compare);
	printf("{\"requests\": %lu, \"seconds\": %f, \"p50_ns\": %u, \"p99_ns\": %u}\n", total,
	       took / 1e9, all[total / 2], all[total * 99 / 100]);
	kill(server, SIGKILL);
	waitpid(server, NULL, 0);
	return 0;
}

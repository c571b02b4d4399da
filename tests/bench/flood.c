// SPDX-License-Identifier: MIT
/*
 * flood RATE SECONDS: about RATE events per second of tcp_client, as cheaply as can be.
 *
 * One connection over loopback whose reader never reads: once its buffers are full each
 * send() is refused (EAGAIN), which makes two events, `send` and `send_short`.
 *
 * Prints its process id, waits for a line on standard input, fills the buffers, and
 * prints how many sends it then made in how many seconds.
 */
#include <arpa/inet.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BURST 64 /* sends at a time, at most; so many as make up half a millisecond */

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	struct sockaddr_in here = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}};
	int listening = socket(AF_INET, SOCK_STREAM, 0), fd = socket(AF_INET, SOCK_STREAM, 0), i;
	socklen_t length = sizeof(here);
	static char data[1 << 20];
	double rate, seconds, began, due;
	int burst;
	uint64_t count = 0;
	char line[2];

	if (argc != 3 || bind(listening, (struct sockaddr *)&here, length) || listen(listening, 1))
		return 2;
	rate = atof(argv[1]) / 2;
	burst = rate / 2000 < 1 ? 1 : rate / 2000 > BURST ? BURST : rate / 2000;
	seconds = atof(argv[2]);
	getsockname(listening, (struct sockaddr *)&here, &length);
	printf("%d\n", getpid());
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 2;
	if (connect(fd, (struct sockaddr *)&here, sizeof(here)) ||
	    accept(listening, NULL, NULL) < 0)
		return 1;
	/* The reader's buffer grows for a while; refused five times in a row is full. */
	for (i = 0; i < 5;) {
		if (send(fd, data, sizeof(data), MSG_DONTWAIT) < 0) {
			i++;
			usleep(20000);
		} else {
			i = 0;
		}
	}
	began = now();
	while ((due = now() - began) < seconds) {
		struct timespec pause = {0, 20000};

		if (count >= due * rate) {
			nanosleep(&pause, NULL);
			continue;
		}
		for (i = 0; i < burst; i++)
			if (send(fd, data, 100, MSG_DONTWAIT) >= 0)
				return 1;
		count += burst;
	}
	printf("{\"sends\": %lu, \"seconds\": %f}\n", count, now() - began);
	return 0;
}

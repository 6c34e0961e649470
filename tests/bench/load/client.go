package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long an answer may take.
const patience = 10 * time.Second

func (c Client) address(port uint16) (netip.AddrPort, error) {
	addr, err := netip.ParseAddr(c.Addr)
	return netip.AddrPortFrom(addr, port), err
}

// bulk sends on several connections for the time given, and counts what has arrived.
func bulk(c Client) (Result, error) {
	addr, err := c.address(PortSink)
	if err != nil {
		return Result{}, err
	}
	var result Result
	var mu sync.Mutex
	var senders sync.WaitGroup
	start := time.Now()
	end := start.Add(c.Warm + c.Duration)
	for range c.Connections {
		senders.Go(func() {
			n, err := send(addr, end)
			mu.Lock()
			defer mu.Unlock()
			result.Units += float64(n)
			if err != nil {
				result.failed(err)
			}
		})
	}
	senders.Wait()
	result.Rate = result.Units / time.Since(start).Seconds()
	return result, nil
}

// send writes until end, and returns how much the server says has arrived.
func send(addr netip.AddrPort, end time.Time) (uint64, error) {
	conn, err := net.DialTimeout("tcp4", addr.String(), patience)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(end.Add(patience)); err != nil {
		return 0, err
	}
	block := make([]byte, 128<<10)
	sent := uint64(0)
	for time.Now().Before(end) {
		n, err := conn.Write(block)
		sent += uint64(n)
		if err != nil {
			return 0, err
		}
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return 0, err
	}
	var answer [8]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return 0, err
	}
	got := binary.BigEndian.Uint64(answer[:])
	if got != sent {
		return got, fmt.Errorf("%d bytes sent, %d arrived", sent, got)
	}
	return got, nil
}

// pingpong sends a message and waits for it to come back, on one connection.
func pingpong(c Client) (Result, error) {
	addr, err := c.address(PortEcho)
	if err != nil {
		return Result{}, err
	}
	debug.SetGCPercent(-1)
	fd, err := dialWait(addr, patience)
	if err != nil {
		return Result{}, err
	}
	defer unix.Close(fd)
	out, in := make([]byte, c.Size), make([]byte, c.Size)
	var result Result
	took := make([]int64, 0, 1<<20)
	begin := time.Now().Add(c.Warm)
	end := begin.Add(c.Duration)
	for now := time.Now(); now.Before(end); {
		if err := writeAll(fd, out); err != nil {
			return result, err
		}
		if err := readFull(fd, in); err != nil {
			return result, err
		}
		then := now
		now = time.Now()
		result.Units++
		if then.After(begin) {
			took = append(took, int64(now.Sub(then)))
		}
	}
	result.Rate = float64(len(took)) / c.Duration.Seconds()
	result.latencies(took)
	return result, nil
}

// request keeps one request under way on each of several connections.
func request(c Client) (Result, error) {
	addr, err := c.address(PortRequest)
	if err != nil {
		return Result{}, err
	}
	debug.SetGCPercent(-1)
	poller, err := newPoller()
	if err != nil {
		return Result{}, err
	}
	type state struct {
		sent time.Time
		got  int
	}
	states := map[int]*state{}
	for range c.Connections {
		fd, err := dialWait(addr, patience)
		if err != nil {
			return Result{}, err
		}
		if err := errors.Join(unix.SetNonblock(fd, true), poller.add(fd, unix.EPOLLIN)); err != nil {
			return Result{}, err
		}
		states[fd] = &state{}
	}
	var result Result
	text := []byte(requestText)
	buffer := make([]byte, 16<<10)
	took := make([]int64, 0, 1<<20)
	begin := time.Now().Add(c.Warm)
	end := begin.Add(c.Duration)
	for fd, s := range states {
		s.sent = time.Now()
		if err := writeAll(fd, text); err != nil {
			return result, err
		}
	}
	for {
		events, err := poller.wait(patience)
		if err != nil {
			return result, err
		}
		if len(events) == 0 {
			return result, fmt.Errorf("no answer in %v", patience)
		}
		now := time.Now()
		if now.After(end) {
			break
		}
		for _, e := range events {
			fd := int(e.Fd)
			s := states[fd]
			n, err := unix.Read(fd, buffer)
			if errors.Is(err, unix.EAGAIN) {
				continue
			}
			if err != nil || n == 0 {
				return result, fmt.Errorf("read answer: %d bytes, %w", n, errors.Join(err, io.ErrUnexpectedEOF))
			}
			if s.got += n; s.got < len(responseText) {
				continue
			}
			now := time.Now()
			result.Units++
			if s.sent.After(begin) {
				took = append(took, int64(now.Sub(s.sent)))
			}
			s.sent, s.got = now, 0
			if err := writeAll(fd, text); err != nil {
				return result, err
			}
		}
	}
	result.Rate = float64(len(took)) / c.Duration.Seconds()
	result.latencies(took)
	return result, nil
}

// idle makes connections, proves each by one round trip, and holds them.
func idle(c Client) (Result, error) {
	addr, err := c.address(PortEcho)
	if err != nil {
		return Result{}, err
	}
	var result Result
	message := make([]byte, 64)
	for range c.Connections {
		fd, err := dialWait(addr, patience)
		if err == nil {
			if err = writeAll(fd, message); err == nil {
				err = readFull(fd, message)
			}
		}
		if err != nil {
			result.failed(err)
			continue
		}
		result.Units++
	}
	return result, nil
}

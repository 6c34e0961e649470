package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"
)

// syn sends one SYN (RFC 9293, section 3.1) by a raw socket, as a program does that goes round its host's TCP; the container needs
// CAP_NET_RAW. No answer is waited for.
func syn(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("syn", flag.ExitOnError)
	from := fs.Uint("from", 4242, "source port")
	addr, err := target(fs, args)
	if err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	to, err := netip.ParseAddr(host)
	if err != nil || !to.Is4() {
		return fmt.Errorf("%q: want an IPv4 address", host)
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return err
	}
	route, err := net.Dial("udp4", addr) // which says what address this host has towards it
	if err != nil {
		return err
	}
	defer route.Close()
	source := route.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	segment := make([]byte, 20)
	binary.BigEndian.PutUint16(segment[0:], uint16(*from))
	binary.BigEndian.PutUint16(segment[2:], uint16(number))
	segment[12], segment[13] = 5<<4, 2 // five words of header; SYN
	binary.BigEndian.PutUint16(segment[14:], 1024)
	binary.BigEndian.PutUint16(segment[16:], checksum(source, to, segment))
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	return syscall.Sendto(fd, segment, 0, &syscall.SockaddrInet4{Addr: to.As4()})
}

// checksum is TCP's, over the segment and the addresses.
func checksum(from, to netip.Addr, segment []byte) uint16 {
	covered := append(append(from.AsSlice(), to.AsSlice()...), 0, syscall.IPPROTO_TCP, 0, byte(len(segment)))
	covered = append(covered, segment...)
	var sum uint32
	for i := 0; i < len(covered); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(covered[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

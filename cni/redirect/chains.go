package redirect

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Ports of the proxy in a pod's network namespace, where nftables redirects.
const (
	outboundPort  = 15001
	plaintextPort = 15006
	hbonePort     = 15008
)

// Priorities that netfilter gives its own parts.
const (
	priorityMangle      = -150
	priorityDestination = -100
	priorityFilter      = 0
	prioritySource      = 100
)

// Chain is a base chain of nftables: what is done to packets at one point of their way.
type Chain struct {
	Name string
	// Kind is "filter", "nat" or "route".
	Kind string
	// Hook is the point, as unix.NF_INET_PRE_ROUTING.
	Hook uint32
	// Priority orders the chains of a point.
	Priority int32
	// Steps are tried in order; the first that matches and has a verdict ends the chain.
	Steps []Step
}

// Step is what is done to a packet that meets all of its conditions. A condition's zero value is met by every packet.
type Step struct {
	// In and Out are devices, by name.
	In, Out string
	// Source and Destination are networks; their family is a condition too.
	Source, Destination netip.Prefix
	// Protocol is unix.IPPROTO_TCP or another one.
	Protocol uint8
	// Port is the destination port; it needs Protocol.
	Port uint16
	// Opens is met by the packet that begins a TCP connection; it needs Protocol.
	Opens bool
	// Proxy is met by packets of sockets with the proxy's mark.
	Proxy bool
	// Answers is met by packets against the direction of a connection that SetConnection has noted.
	Answers bool

	Do Action
	// To is the port for Redirect.
	To uint16
}

// Action is what a step does.
type Action int

// The actions.
const (
	Accept Action = iota
	// Drop loses the packet.
	Drop
	// Reset answers with a TCP reset.
	Reset
	// Redirect gives the packet's connection to a local port; the kernel keeps the original destination.
	Redirect
	// NoteConnection marks the packet's connection as the proxy's to the application.
	NoteConnection
	// Mark gives the packet netns.RedirectMark, by which it is routed anew.
	Mark
)

// podChains decides what nftables does in a pod. It is the contract that Istio's agent has with its node proxy, so that
// either proxy works here; what it adds are the two last chains.
//
// Only packets that begin a connection are redirected: those of connections that are older than the rules must go on as
// they were. The kernel asks the chains of kind nat only for the first packet it sees of a connection, and an application
// that can send raw packets might let that be another than the one that opens it. What opens a connection and has come
// past redirection is therefore lost or reset by the last chains.
func podChains(pod PodConfig) []Chain {
	tcp := Step{Protocol: unix.IPPROTO_TCP, Opens: true}
	redirect := func(to uint16) Step { s := tcp; s.Do, s.To = Redirect, to; return s }
	end := func(a Action) Step { s := tcp; s.Do = a; return s }
	probes := []Step{{Source: host(ProbeSource4)}, {Source: host(ProbeSource6)}}
	fromHere := Step{In: "lo"}
	byProxy, toHere := Step{Proxy: true}, Step{Out: "lo"}

	in := slices.Concat([]Step{fromHere}, probes, []Step{
		{Protocol: unix.IPPROTO_TCP, Port: hbonePort}, redirect(plaintextPort),
	})
	out := []Step{byProxy, toHere, redirect(outboundPort)}
	lastIn := slices.Concat([]Step{fromHere}, probes, []Step{
		{Protocol: unix.IPPROTO_TCP, Port: plaintextPort}, {Protocol: unix.IPPROTO_TCP, Port: hbonePort}, end(Reset),
	})
	lastOut := []Step{byProxy, toHere, end(Drop)}
	if pod.Released {
		in, out, lastIn, lastOut = nil, nil, nil, nil
	}
	return []Chain{
		// The application's answers to the proxy, which calls from the client's address, are kept in the pod.
		{"note", "filter", unix.NF_INET_PRE_ROUTING, priorityMangle, []Step{{In: "lo", Proxy: true, Do: NoteConnection}}},
		{"answer", "route", unix.NF_INET_LOCAL_OUT, priorityMangle, []Step{{Answers: true, Do: Mark}}},
		{"in", "nat", unix.NF_INET_PRE_ROUTING, priorityDestination, in},
		{"out", "nat", unix.NF_INET_LOCAL_OUT, priorityDestination, out},
		{"last_in", "filter", unix.NF_INET_LOCAL_IN, priorityFilter, lastIn},
		{"last_out", "filter", unix.NF_INET_POST_ROUTING, priorityFilter, lastOut},
	}
}

func host(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }

package bpf

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Devices are the interfaces that a pod's exclusions name, as they are in its network namespace now.
type Devices struct {
	// Indices are the interfaces' own, those that exist.
	Indices []uint32
	// Networks are reached through them, Others through other interfaces.
	Networks, Others []netip.Prefix
}

// entries are a pod's exclusions in the kernel's form.
type entries struct {
	numbers  map[connectExclusionKey]connectCapture
	networks map[connectNetworkKey]connectCapture
}

// compile decides the entries. Where one prefix is in another the longest counts in the kernel, but what is left out is
// to win: a captured network within one that is left out gets no entry.
func compile(pod Pod) entries {
	e := entries{map[connectExclusionKey]connectCapture{}, map[connectNetworkKey]connectCapture{}}
	for _, d := range []struct {
		direction connectDirection
		kind      connectExclusionKind
		mesh.Exclusion
		devices Devices
	}{
		{connectDirectionIN, connectExclusionKindPORT_IN, pod.Exclude.In, Devices{}},
		{connectDirectionOUT, connectExclusionKindPORT_OUT, pod.Exclude.Out, pod.Devices},
	} {
		port := func(ports []uint16, what connectCapture) {
			for _, p := range ports {
				e.numbers[connectExclusionKey{Netns: pod.Cookie, Kind: d.kind, Number: uint32(p)}] = what
			}
		}
		port(d.CapturedPorts, connectCaptureCAPTURED)
		port(d.Ports, connectCaptureEXCLUDED)
		excluded := slices.Concat(d.Networks, d.devices.Networks)
		for _, n := range d.CapturedNetworks {
			if !within(n, excluded) {
				e.networks[networkKey(pod.Cookie, d.direction, n)] = connectCaptureCAPTURED
			}
		}
		for _, n := range d.devices.Others {
			// A hole in what is left out because it is reached through an interface.
			switch {
			case !within(n, d.devices.Networks) || within(n, d.Networks):
			case within(n, d.CapturedNetworks):
				e.networks[networkKey(pod.Cookie, d.direction, n)] = connectCaptureCAPTURED
			default:
				e.networks[networkKey(pod.Cookie, d.direction, n)] = connectCaptureNO_SAY
			}
		}
		for _, n := range excluded {
			e.networks[networkKey(pod.Cookie, d.direction, n)] = connectCaptureEXCLUDED
		}
	}
	for _, index := range pod.Devices.Indices {
		key := connectExclusionKey{Netns: pod.Cookie, Kind: connectExclusionKindDEVICE, Number: index}
		e.numbers[key] = connectCaptureEXCLUDED
	}
	return e
}

// within tells whether a network is part of one of others.
func within(n netip.Prefix, others []netip.Prefix) bool {
	return slices.ContainsFunc(others, func(o netip.Prefix) bool { return o.Bits() <= n.Bits() && o.Contains(n.Addr()) })
}

// networkKeyPrefix is how many bits of a networkKey come before its address.
const networkKeyPrefix = 64 + 32

func networkKey(cookie uint64, direction connectDirection, n netip.Prefix) connectNetworkKey {
	bits := n.Bits()
	if n.Addr().Is4() {
		bits += 96
	}
	return connectNetworkKey{
		Bits: uint32(networkKeyPrefix + bits), Netns: [2]uint32{uint32(cookie), uint32(cookie >> 32)},
		Direction: direction, Addr: toAddr(n.Addr()),
	}
}

func (k connectNetworkKey) cookie() uint64 { return uint64(k.Netns[0]) | uint64(k.Netns[1])<<32 }

// flags are what differs from pod to pod.
func (p Pod) flags() connectPodFlags {
	var flags connectPodFlags
	e := compile(p)
	for _, f := range []struct {
		on   bool
		flag connectPodFlags
	}{
		{!p.Exclude.DNS, connectPodFlagsPOD_DNS},
		{p.Exclude.Inbound, connectPodFlagsPOD_INBOUND_EXCLUDED},
		{len(e.numbers)+len(e.networks) > 0, connectPodFlagsPOD_EXCLUSIONS},
		{p.Exclude.In.Listed, connectPodFlagsPOD_IN_LISTED},
		{p.Exclude.Out.Listed, connectPodFlagsPOD_OUT_LISTED},
	} {
		if f.on {
			flags |= f.flag
		}
	}
	return flags
}

// fingerprint stands for all of a pod's exclusions.
func (p Pod) fingerprint() uint64 {
	hash := fnv.New64a()
	fmt.Fprint(hash, p.Exclude, p.Devices)
	return hash.Sum64()
}

// putExclusions adds the pod's entries; dropExclusions removes those that are not wanted (any more).
func (n *Node) putExclusions(wanted entries) error {
	for key, what := range wanted.numbers {
		if err := n.maps.Exclusions.Put(key, what); err != nil {
			return fmt.Errorf("set an exclusion: %w", err)
		}
	}
	for key, what := range wanted.networks {
		if err := n.maps.ExcludedNetworks.Put(key, what); err != nil {
			return fmt.Errorf("set an excluded network: %w", err)
		}
	}
	return nil
}

func (n *Node) dropExclusions(cookie uint64, wanted entries) error {
	err := errors.Join(
		deleteEach(n.maps.Exclusions, func(k connectExclusionKey, _ connectCapture) bool {
			_, keep := wanted.numbers[k]
			return k.Netns == cookie && !keep
		}),
		deleteEach(n.maps.ExcludedNetworks, func(k connectNetworkKey, _ connectCapture) bool {
			_, keep := wanted.networks[k]
			return k.cookie() == cookie && !keep
		}),
	)
	if err != nil {
		return fmt.Errorf("remove the pod's exclusions: %w", err)
	}
	return nil
}

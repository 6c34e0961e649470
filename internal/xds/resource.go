// Package xds (protocols) is delta ADS (envoy.service.discovery.v3, DeltaAggregatedResources), both ends: a client that
// keeps subscriptions over reconnects, and a server that pushes what changed and no more. It knows no noun: resources
// are names, versions and bytes.
//
// Versions are hashes of the content, so they mean the same to every replica and after every restart: a client that
// reconnects says what it has (initial_resource_versions) and is sent only what differs.
package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Wildcard subscribes to every resource of a type.
const Wildcard = "*"

// Resource is one named resource.
type Resource struct {
	Name string
	// Version is the content's hash; the server computes it where it is empty.
	Version string
	// Aliases are further names the resource can be subscribed to by.
	Aliases []string
	Body    *anypb.Any
}

// NewResource packs a message, deterministically, so that equal content has an equal version.
func NewResource(name string, message proto.Message, aliases ...string) (Resource, error) {
	bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		return Resource{}, fmt.Errorf("pack resource %q: %w", name, err)
	}
	body := &anypb.Any{TypeUrl: "type.googleapis.com/" + string(message.ProtoReflect().Descriptor().FullName()), Value: bytes}
	r := Resource{Name: name, Aliases: aliases, Body: body}
	r.Version = contentVersion(r)
	return r, nil
}

// contentVersion is 96 bits of hash over body and aliases: short on the wire, and no two contents share it.
func contentVersion(r Resource) string {
	h := sha256.New()
	h.Write(r.Body.GetValue())
	for _, alias := range r.Aliases {
		h.Write([]byte{0})
		h.Write([]byte(alias))
	}
	return hex.EncodeToString(h.Sum(nil)[:12])
}

// ResourceError says that a handler refused one resource and kept what it had of it. Errors of several resources are
// joined with errors.Join.
type ResourceError struct {
	Name string
	Err  error
}

func (e *ResourceError) Error() string { return fmt.Sprintf("resource %q: %v", e.Name, e.Err) }

// Unwrap gives the cause.
func (e *ResourceError) Unwrap() error { return e.Err }

// refused are the resources that err names; all is true where some part of err names none.
func refused(err error) (names map[string]bool, all bool) {
	names = map[string]bool{}
	var walk func(error)
	walk = func(err error) {
		var one *ResourceError
		if joined, ok := err.(interface{ Unwrap() []error }); ok {
			for _, e := range joined.Unwrap() {
				walk(e)
			}
		} else if errors.As(err, &one) {
			names[one.Name] = true
		} else {
			all = true
		}
	}
	if err != nil {
		walk(err)
	}
	return names, all
}

// fromWire reads the resources of a response.
func fromWire(response *discovery.DeltaDiscoveryResponse) []Resource {
	out := make([]Resource, 0, len(response.GetResources()))
	for _, r := range response.GetResources() {
		out = append(out, Resource{Name: r.GetName(), Version: r.GetVersion(), Aliases: r.GetAliases(), Body: r.GetResource()})
	}
	return out
}

func (r Resource) toWire() *discovery.Resource {
	return &discovery.Resource{Name: r.Name, Version: r.Version, Aliases: r.Aliases, Resource: r.Body}
}
